"""Which files .gitignore and .rayignore exclude, matched in linear time whatever the pattern."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from configs import ConfigError
from configs.reading.parse import read_text, shortened

NAMES = (".gitignore", ".rayignore")
MAX_BYTES = 64 * 2**10
"""Most bytes of such a file."""

Ignored = Callable[[Path], bool]

_STAR = r"\[\^/\]\*"
# Of one segment of a path in Ray's regular expressions: an escaped letter, `?`, a bracket expression, a plain letter.
_LETTER = r"(?:\\.|\[\^/\](?![*+])|\[(?!\^/\])(?:\\\^|\^?\]?)[^\]]*\]|[^/()[\\^$.])"
_MANY_STARS = re.compile(f"(?:{_STAR})+")
_UP_TO_A_STAR = re.compile(f"{_STAR}({_LETTER}+)(?={_STAR})", re.DOTALL)
_ANY_FOLDERS = "(?:/.+)?"


def ignored_by_files(folder: Path) -> list[Ignored]:
    """Predicates for the paths that a folder's own .gitignore and .rayignore exclude.

    Raises:
        ConfigError: one of them is too large, is not UTF-8, or has an invalid pattern.
        OSError: it cannot be read.
    """
    found = []
    for path in (folder / name for name in NAMES):
        if path.is_file():
            try:
                found.append(ignored_by(folder, read_text(path, MAX_BYTES).splitlines()))
            except ValueError as error:
                raise ConfigError(f"{path} cannot be read: {error}") from None
    return found


def ignored_by(folder: Path, patterns: Iterable[str]) -> Ignored:
    """A predicate for the paths below a folder that git patterns exclude. Raises ValueError."""
    from cluster.gangs.ray_private import pattern_to_regex

    rules: list[tuple[re.Pattern[str], bool]] = []
    for pattern in patterns:
        try:
            expression, leaves_out = pattern_to_regex(pattern)
            if expression is not None:
                rules.insert(0, (re.compile(linear(expression), re.DOTALL), leaves_out))  # the last match wins
        except (re.error, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(f"the pattern {shortened(repr(pattern), 100)}: {error}") from None

    def ignored(path: Path) -> bool:
        name = path.relative_to(folder).as_posix()
        return next((leaves_out for rule, leaves_out in rules if rule.match(name)), False)

    return ignored


def linear(expression: str) -> str:
    """A regular expression of Ray's for a pattern, so that what a star has passed is not tried again.

    Between two stars, and between two `/**/`, the first place that fits is as good as any later one (as in
    `fnmatch.translate`): so it is taken for good, in an atomic group. As Ray has them, each star multiplies the time.
    """
    expression = _MANY_STARS.sub("[^/]*", expression)
    expression = _UP_TO_A_STAR.sub(r"(?>[^/]*?\1)", expression)
    first, *blocks = expression.split(_ANY_FOLDERS)
    if not blocks:
        return expression
    if first.startswith("^(?:.+/)?"):
        first = f"^(?>(?:[^/]+/)*?{first.removeprefix('^(?:.+/)?')}(?=/|$))"
    *middle, last = blocks
    return "".join([first, *(f"(?>(?:/[^/]+)*?{block}(?=/|$))" for block in middle if block), _ANY_FOLDERS, last])
