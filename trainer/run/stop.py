"""The request to stop a run: a file of its folder, which other processes write and each of its own looks for."""

from pathlib import Path

from trainer.files.durable import replace_text

STOP = "stop"


def request_stop(run_dir: Path, reason: str = "") -> None:
    """Ask a run to write a checkpoint and leave; every process of it sees this at its next step.

    Args:
        reason: of whoever will start it again; empty: the user's.
    """
    replace_text(run_dir / STOP, reason)  # whole: an empty one would be the user's


def stop_requested(run_dir: Path) -> bool:
    return (run_dir / STOP).exists()


def take_stop(run_dir: Path) -> str | None:
    """The reason of a stop that was asked for, which is then forgotten; None: nobody did."""
    try:
        reason = (run_dir / STOP).read_text(errors="replace")
    except FileNotFoundError:
        return None
    (run_dir / STOP).unlink(missing_ok=True)
    return reason
