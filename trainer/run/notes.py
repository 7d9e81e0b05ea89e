"""A user's note and tags on a run, kept in notes.json in the run's folder and shown by its tracker."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from configs import ConfigError
from configs.reading.parse import parse_json, read_text, shortened
from trainer.files.durable import replace_text
from trainer.files.own_files import require_own

NOTES = "notes.json"
MAX_BYTES = 1 << 18
MAX_NOTE = 5000
"""Characters."""
MAX_VALUE = 1000
MAX_TAGS = 50
RESERVED = re.compile(
    r"(mlflow|muster|changed|versions)([.].*|$)"
    r"|attempt|reason|status|step|world_size|device|host|pid|git_.*"
)
"""Tags that the tracker gets from the record."""


class Notes(NamedTuple):
    """The note and tags of one run."""

    note: str = ""
    tags: Mapping[str, str] = {}


def read_notes(run_dir: Path) -> Notes:
    """A run's notes; empty if there is no such file, or it is not what `write_notes` writes."""
    try:
        # Only a regular file of the folder itself: no link, and no pipe, on which a read would block.
        path = run_dir / NOTES
        if path.is_symlink() or not path.is_file():
            return Notes()
        tree = parse_json(read_text(path, MAX_BYTES))
    except (OSError, ValueError):
        return Notes()
    note, tags = (tree.get("note", ""), tree.get("tags", {})) if isinstance(tree, dict) else ("", {})
    known = tags.items() if isinstance(tags, dict) else ()
    return Notes(
        note if isinstance(note, str) else "",
        {key: value for key, value in known if isinstance(value, str) and not wrong_tag(key, value)},
    )


def write_notes(run_dir: Path, notes: Notes) -> None:
    """Replace a run's notes. Raises ConfigError, as `require_own`."""
    require_own(run_dir)
    replace_text(run_dir / NOTES, json.dumps({"note": notes.note, "tags": dict(notes.tags)}, indent=1) + "\n")


def wrong_tag(key: str, value: str) -> str:
    """Why a tag is refused: MLflow does not take it, or the record has it; empty if it is fine."""
    shown = shortened(repr(key), 60)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,99}", key):
        return f"{shown} is not a tag name: use up to 100 letters, digits, _ . - and spaces"
    if RESERVED.fullmatch(key):
        return f"the tag {shown} is reserved for the record: choose another name"
    if len(value) > MAX_VALUE:
        return f"the tag {shown} has a value of {len(value):,} characters; at most {MAX_VALUE:,} are allowed"
    return ""


def set_note(run_dir: Path, text: str) -> None:
    """Set the note. Raises ConfigError if it is too long."""
    if len(text) > MAX_NOTE:
        raise ConfigError(f"the note has {len(text):,} characters; at most {MAX_NOTE:,} are allowed")
    write_notes(run_dir, read_notes(run_dir)._replace(note=text))


def set_tags(run_dir: Path, changes: Mapping[str, str]) -> None:
    """Set tags; an empty value removes one. Raises ConfigError if one is wrong."""
    for key, value in changes.items():
        if wrong := wrong_tag(key, value):
            raise ConfigError(wrong)
    notes = read_notes(run_dir)
    tags = {key: value for key, value in (dict(notes.tags) | dict(changes)).items() if value}
    if len(tags) > MAX_TAGS:
        raise ConfigError(f"the run would have {len(tags)} tags; at most {MAX_TAGS} are allowed")
    write_notes(run_dir, notes._replace(tags=tags))
