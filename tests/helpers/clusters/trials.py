"""Many runs on a private Ray (`cluster.attempts.many_runs`), in a process whose environment changes."""

from functools import partial
from pathlib import Path

from support import tiny

from cluster.attempts.tasks import Task
from cluster.gangs.session import end_children, ray_session, session_folder
from cluster.gangs.share import Node, Share
from cluster.server.waiting import Gang


class InOrder:
    """A source of runs of one process and one CPU each, in order."""

    def __init__(self, run_dirs: list[Path]) -> None:
        self._left = list(run_dirs)

    def next(self):
        return Task(Gang(1, Share(1.0, 0.0)), partial(self._left.pop, 0)) if self._left else None

    def more(self) -> bool:
        return bool(self._left)


def train_all(root: Path, data: Path) -> list[tuple[str, str, str]]:
    """Train five runs on two gangs, two of them twice; returns (name, status, reason) as they end."""
    from trainer.run.folder import prepare_run

    runs = {}
    for name in ("a", "b", "c", "d", "wrong"):
        config = tiny(run={"name": name, "root": str(root)}, data={"path": str(data)}, cluster={"max_failures": 0})
        runs[name] = prepare_run(config)
    config = runs["wrong"] / "config.yaml"
    config.write_text(config.read_text().replace("plugins: []", f"plugins: [{root / 'missing.py'}]"))
    folder, found = session_folder(), []
    try:
        with ray_session(None, Node(2, 0), folder):
            from cluster.attempts.many_runs import Trials

            for some in (("a", "b", "c", "wrong"), ("a", "d")):
                source = InOrder([runs[name] for name in some])
                trials = Trials(source, lambda each: {}, joined=False, folder="/")
                found += [(end.run_dir.name, end.status, end.reason) for end in trials]
    finally:
        end_children()
    return found
