"""The front end's files as they are served, found by name in a table and never by a path that was asked for."""

import hashlib
from pathlib import Path
from typing import NamedTuple

STATIC = Path(__file__).parent / "static"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}


class File(NamedTuple):
    content: bytes
    kind: str
    etag: str


class StaticFiles:
    """Reads each file once, and again when it has changed."""

    def __init__(self, folder: Path = STATIC) -> None:
        self._folder = folder
        self._paths: dict[str, Path] = {}
        self._read: dict[str, tuple[int, File]] = {}

    def get(self, name: str) -> File | None:
        """The file of a name such as `js/app.js`; None: there is none."""
        if name not in self._paths:
            found = [path for path in self._folder.rglob("*") if path.suffix in KINDS and path.is_file()]
            self._paths = {path.relative_to(self._folder).as_posix(): path for path in found}
        path = self._paths.get(name)
        if path is None:
            return None
        changed = path.stat().st_mtime_ns
        known = self._read.get(name)
        if known is None or known[0] != changed:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            known = self._read[name] = changed, File(content, KINDS[path.suffix], etag)
        return known[1]
