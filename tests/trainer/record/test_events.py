"""The table of events: what the code writes stands in it, what it does not hold fails here, older lines are read."""

import ast
import json
from pathlib import Path

import pytest

from trainer.record.events import ALWAYS, EVENTS, FIELDS, SHOWN, WrongEvent
from trainer.record.lines import Record, read_events

ROOT = Path(__file__).parents[3]
WRITERS = ("event", "_note", "_tell", "Change")


def written() -> list[tuple[str, str, list[str]]]:
    """(where, event, fields) of every call in the source that names its event."""
    found = []
    for path in sorted(path for package in ("trainer", "cluster") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            if ast.unparse(node.func).rpartition(".")[2] in WRITERS and isinstance(node.args[0].value, str):
                fields = [keyword.arg for keyword in node.keywords if keyword.arg]
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node.args[0].value, fields))
    return found


def test_every_event_that_is_written_stands_in_the_table_with_its_fields():
    calls = written()
    assert len(calls) > 30
    wrong = {where: name for where, name, _ in calls if name not in EVENTS}
    assert wrong == {}
    strange = {where: {*fields} - {*EVENTS[name].needed, *EVENTS[name].more} for where, name, fields in calls}
    assert {where: names for where, names in strange.items() if names} == {}


def test_every_field_has_one_type():
    fields = {field for each in EVENTS.values() for field in (*each.needed, *each.more)}
    assert fields | {*ALWAYS} == FIELDS.keys() | SHOWN.keys()
    assert not FIELDS.keys() & SHOWN.keys()


@pytest.mark.parametrize(
    ("name", "details", "wrong"),
    [
        ("rolback", {"to_step": 1}, "there is no event rolback"),
        ("rollback", {"to_step": 1, "from": 2}, "rollback has no field from"),
        ("rollback", {"from_step": 2}, "rollback: it has no to_step"),
        ("rollback", {"to_step": "1"}, "rollback: its to_step is '1'"),
        ("evaluation", {"eval_loss": "low"}, "evaluation: its eval_loss is 'low'"),
    ],
)
def test_a_wrong_event_fails_a_test_and_no_run(tmp_path, name, details, wrong):
    record = Record(tmp_path, 1)
    with pytest.warns(WrongEvent, match=f": {wrong}$"):
        record.event(name, **details)
    [line] = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= details.items(), "it is written all the same"
    with pytest.raises(WrongEvent):  # by pyproject.toml
        record.event(name, **details)


def test_lines_of_older_versions(tmp_path):
    head = {"time": 1.0, "attempt": 1}
    lines = [
        head | {"event": "attempt_ended", "status": "KILLED"},
        head
        | {"event": "attempt_ended", "status": "FAILED", "reason": "TrainingStopped: 10 steps in a row had a non-"},
        head | {"event": "attempt_ended", "status": "FAILED", "reason": "RuntimeError: 10 steps in a row"},
        head | {"event": "of_another_version", "step": 3, "field": {}},
        head | {"event": "rollback", "step": 7},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    killed, diverged, failed, other = read_events(tmp_path)
    assert killed["status"] == "STOPPED"
    assert (diverged["cause"], failed.get("cause")) == ("nonfinite", None)
    assert other["field"] == {}
