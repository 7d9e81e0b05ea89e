"""HTML files of runs and comparisons that open without a server and ask nobody for anything."""

import base64
import hashlib
import html
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.files.durable import replace_text
from trainer.files.plain_json import dump

from ..index.runs_index import Entry
from ..static_files import STATIC
from .bundle import bundled
from .contents import contents_of_comparison, contents_of_run, contents_of_sweep

STYLES = ("vendor/uPlot.css", "app.css", "pages.css", "plans.css")
ENTRY = "js/exported/main.js"
_FONT = re.compile(r'url\("/static/(fonts/[\w-]+\.woff2)"\)')
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page needs JavaScript.</noscript>
<script type="application/json" id="told">{told}</script>
<script>{script}</script>
</body>
</html>
"""


def write_pages(
    entries: Sequence[Entry], folder: Path, done: Callable[[Path], None], sweeps: Sequence[Path] = ()
) -> None:
    """A file for each run, `run-NAME.html`, `compare.html` where there are several, and `sweep-NAME.html`.

    Args:
        done: told of each file that is written.
        sweeps: folders of sweeps.

    Raises:
        OSError: one cannot be written.
        ConfigError: the records of a sweep cannot be read.
    """
    style, script, now = _style(), bundled(ENTRY), time.time()
    files = _names("run", [entry.row.id for entry in entries])
    metrics = {}

    def write(name: str, title: str, told: dict[str, Any]) -> None:
        replace_text(folder / name, _page(title, told | {"files": files, "time": now}, style, script))
        done(folder / name)

    for entry in entries:
        told = contents_of_run(entry)
        metrics[entry.row.id] = told["each"][entry.row.id]["details"]["metrics"]
        write(files[entry.row.id], entry.row.name, told)
    if len(entries) > 1:
        write("compare.html", f"{len(entries)} runs", contents_of_comparison(entries, metrics))
    for path, name in _names("sweep", [str(path) for path in sweeps], lambda path: Path(path).name).items():
        write(name, Path(path).name, contents_of_sweep(Path(path)))


def _names(kind: str, ids: Sequence[str], called: Callable[[str], str] = str) -> dict[str, str]:
    """A file's name for each run or sweep, of letters that every file system and address takes as they are."""
    found: dict[str, str] = {}
    for id in ids:
        stem = name = f"{kind}-" + re.sub(r"[^A-Za-z0-9._-]", "_", called(id))[:150]
        number = 1
        while f"{name}.html".lower() in {other.lower() for other in found.values()}:
            number += 1
            name = f"{stem}-{number}"
        found[id] = f"{name}.html"
    return found


def _page(title: str, told: dict[str, Any], style: str, script: str) -> str:
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; font-src data:; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    # In HTML no `<` may stand in it; JSON may write any character by its number. It is ASCII already.
    json = re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", dump(told))
    values = {"policy": policy, "title": html.escape(f"{title} · muster"), "style": style, "told": json}
    return _PAGE.format(**values, script=script)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _style() -> str:
    def inlined(found: re.Match[str]) -> str:
        return f'url("data:font/woff2;base64,{base64.b64encode((STATIC / found[1]).read_bytes()).decode()}")'

    style = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in STYLES)
    style = _FONT.sub(inlined, style)
    assert "</style" not in style
    assert "/static/" not in style
    return style
