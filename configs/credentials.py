"""Passwords and tokens in URIs, masked wherever a URI is written or shown."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_plus

MASK = "***"
_IS_URI = re.compile(r"[A-Za-z][\w+.-]*://")
_URI, _AMONG_WORDS = (
    (re.compile(r"[^\n]+"), re.compile(r"(?P<before>[?&;#])(?P<name>[\w.%+~-]+)=(?P<value>[^&#]+)")),
    (
        re.compile(r"""[^\s"'<>]+"""),
        re.compile(r"""(?P<before>[?&;#])(?P<name>[\w.%+~-]+)=(?P<value>[^\s&;#"'<>]+)"""),
    ),
)
"""The characters that user:password@ and a query parameter may span, in a text that is one URI and in one that contains
URIs."""
_SCHEME = re.compile(r"[A-Za-z][\w+.-]*$")
_LONGEST_SCHEME = 32
_USER = re.compile(r"[^\s/?#:\[\]]*")
_PORT = re.compile(r":\d{1,5}[/?#\s]")
_SECRET = re.compile(
    r"pass(word|wd|phrase|code)?$|pwd$|password|secret|token|credential|signature|^sig$|^auth$|api_?key|access_?key"
    r"|account_?key|private_?key|^key$|odbc_connect|jwt|bearer"
)
_ONLY_USER = ("http", "https", "git+https", "git+http")
"""Schemes where a user name without a password is a token."""


def mask(text: str) -> str:
    """A text with the passwords, tokens and keys of every URI in it replaced by `***`, in time linear in its length."""
    if "://" not in text:
        return text
    piece, parameter = _URI if _IS_URI.match(text) else _AMONG_WORDS
    return parameter.sub(_masked_parameter, piece.sub(lambda found: _masked_users(found[0]), text))


def mask_all(value: Any) -> Any:
    """`without_passwords` for every text in lists and mappings."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {key: mask_all(item) for key, item in value.items()}
    return [mask_all(item) for item in value] if isinstance(value, (list, tuple)) else value


def _masked_users(text: str) -> str:
    """Mask each user:password@ before a host. A password may itself contain an unquoted @: the last @ of the text ends
    it, as in SQLAlchemy. Not one regular expression, which would search for that @ from every character."""
    kept, done, last = [], 0, text.rfind("@")
    mark = text.find("://")
    while 0 <= mark < last:
        scheme = _SCHEME.search(text, max(done, mark - _LONGEST_SCHEME), mark)
        start = mark + len("://")
        end = _USER.match(text, start).end()  # type: ignore[union-attr]  # matches everywhere
        user, web = text[start:end], scheme is not None and scheme[0].lower() in _ONLY_USER
        if scheme and text[end : end + 1] == ":" and end < last:
            if not ((web or "@" in user) and _PORT.match(text, end)):  # else it is a port, with an @ further on
                kept.append(f"{text[done:end]}:{MASK}@")
                done = last + 1
        elif web and (token := user.rpartition("@")[0]):
            kept.append(f"{text[done:start]}{MASK}@")
            done = start + len(token) + 1
        mark = text.find("://", max(done, start))
    return "".join((*kept, text[done:]))


def _masked_parameter(found: re.Match[str]) -> str:
    name = unquote_plus(found["name"]).lower().replace("-", "_")
    return f"{found['before']}{found['name']}={MASK}" if _SECRET.search(name) else found[0]
