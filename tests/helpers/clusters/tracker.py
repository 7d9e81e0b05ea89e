"""MLflow's own server with faults, and what a tracker shows of a run."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from configs import from_dict, to_yaml
from trainer.record.lines import Record, read_metrics
from trainer.tracking.mlflow import MlflowClient


class FaultyServer:
    """MLflow's own server in this process, over the SQLite store of a folder of runs.

    `fault(path)` chooses the fault of a request: None, "before" (it is refused with 500) or "after" (it is carried out,
    but answered with 500). It may block, which delays the answer.
    """

    def __init__(self, folder: Path) -> None:
        os.environ |= {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": f"{folder}/served",
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        from mlflow.server import app  # reads these variables

        self._app = app
        self.fault: Callable[[str], str | None] = lambda path: None
        self._port = 0
        self.up()
        self.uri = f"http://127.0.0.1:{self._port}"

    def up(self) -> None:
        """Listen on the same port as before."""
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self._port, self._faulty, threaded=True)
        self._server.daemon_threads = True  # a held request does not block `down`
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def down(self) -> None:
        """Refuse connections."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _faulty(self, environ: Any, start_response: Any) -> Any:
        fault = self.fault(environ["PATH_INFO"])
        if fault == "before":
            start_response("500 INTERNAL SERVER ERROR", [("Content-Type", "text/plain")])
            return [b"no"]
        if fault == "after":
            list(self._app(environ, lambda *_: None))
            start_response("500 INTERNAL SERVER ERROR", [("Content-Type", "text/plain")])
            return [b"lost"]
        return self._app(environ, start_response)


@contextmanager
def faulty_server(folder: Path) -> Iterator[FaultyServer]:
    """A server for tests, whose clients do not retry on their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        server = FaultyServer(folder)
        yield server
        server.down()
        for name in [name for name in os.environ if name.startswith("_MLFLOW_SERVER_")]:
            del os.environ[name]


def shown(root: Path, run_dir: Path, key: str = "loss", experiment: str = "muster") -> tuple[Any, list[tuple]]:
    """The one MLflow run of a run, found by its name, and `[(step, time in ms, value)]` of one of its metrics."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id], f"attributes.run_name = '{run_dir.name}'")
    history = client.get_metric_history(run.info.run_id, key)
    return run, [(metric.step, metric.timestamp, metric.value) for metric in sorted(history, key=lambda m: m.step)]


def recorded(run_dir: Path, key: str = "loss") -> list[tuple]:
    return [(r["step"], int(r["time"] * 1000), r[key]) for r in read_metrics(run_dir) if key in r]


def assert_all_shown(root: Path, run_dir: Path, experiment: str = "muster") -> Any:
    """Check that each step and evaluation is there once, with the record's values and times. Returns the MLflow run."""
    for key in ("loss", "eval_loss", "tokens"):
        run, points = shown(root, run_dir, key, experiment)
        assert points == recorded(run_dir, key)
    return run


def kept_files(run: Any) -> dict[str, Path]:
    """The artifacts of an MLflow run whose store is a folder, by their names."""
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def make_run(root, name, **sections):
    run_dir = Path(root) / name
    run_dir.mkdir(parents=True)
    config = from_dict({"run": {"name": name}, "tracking": {"interval": 0.1}} | sections)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    Record(run_dir, 0).event("resolved")
    return run_dir, config


def started(run_dir, attempt, **details):
    record = Record(run_dir, attempt)
    record.event("attempt_started", world_size=2, versions={"torch": "2.13"}, **details)
    return record


def take_steps(record, steps, loss=lambda step: 1.0 / step):
    for step in steps:
        routers = {"expert_load": [[0.5, 0.25, 0.25]] * 2, "expert_maxvio": [0.5, 0.5], "router_entropy": [1.0, 0.5]}
        record.metrics({"step": step, "loss": loss(step), "tokens": 8 * step} | routers)
        if step % 10 == 0:
            record.metrics({"step": step, "eval_loss": loss(step), "eval_tokens": 4})
            record.event("checkpoint", step=step)


def end(record, status="FINISHED", step=0):
    record.event("attempt_ended", status=status, reason="said so", step=step)
