"""MLflow as the tracker: a server, or SQLite beside the runs."""

import contextlib
import getpass
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read by mlflow at import. One retry and a short timeout: the shipper decides how long to go on.
for _name, _value in {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Otherwise MLflow's client uploads large files straight to the store, by URLs that the server signs; the store need
    # not be reachable from where a run is, and should not be.
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, RunTag, ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from mlflow.utils.file_utils import local_file_uri_to_path  # noqa: E402
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE  # noqa: E402
from mlflow.utils.uri import is_local_uri  # noqa: E402
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE, MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH  # noqa: E402

from configs import ConfigError  # noqa: E402
from trainer.files.lock_file import lock_file  # noqa: E402
from trainer.files.own_files import require_own  # noqa: E402

from .description import MARK  # noqa: E402
from .flat import NAMES  # noqa: E402
from .start import SQLITE, sqlite_path  # noqa: E402
from .tracker import Input, Point, RunInfo, Sent  # noqa: E402

KEY_TAG = "muster.key"
REASON_TAG, STATUS_TAG = "reason", "muster.status"
KIND_TAG, TRAINING = "mlflow.experimentKind", "custom_model_development"
"""As MLflow 3.17's page writes and reads it."""


def refuse_elsewhere(place: Path, run_id: str) -> None:
    """Refuse a folder for a run's artifacts that does not have MLflow's layout: whoever made the database, or runs the
    server, chooses the folder, and files in it would be overwritten.

    Raises:
        ConfigError: it is not PLACE/RUN_ID/artifacts, or a link leads elsewhere; or as `require_own`.
    """
    experiment = place.parent.parent
    if not re.fullmatch(r"[0-9a-f]{32}", run_id) or place.resolve() != experiment.resolve() / run_id / "artifacts":
        raise ConfigError(
            f"the tracker asks for this run's files in {place}, which is not a folder that MLflow creates for a run"
        )
    require_own(place)


class MlflowTracker:
    """One run in MLflow.

    Sending a metric again with the same step, time and value adds nothing (they are the primary key of MLflow's
    table); with a different time it adds a second point, which cannot be deleted. So what a run already holds is read
    back from it.

    Args:
        uri: `http(s)://server`, `sqlite:////path/mlflow.db` or another database.
        experiment: its name; created if it does not exist.
        artifact_root: where a new experiment keeps its files; None: the server decides.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: Path | None = None) -> None:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._uri, self._experiment_name, self._artifact_root = uri, experiment, artifact_root
        self._run_id = ""
        self._place_is_checked = False

    def open(self, run: RunInfo) -> Sent:
        with _schema_lock(self._uri):
            self._client = MlflowClient(tracking_uri=self._uri)
            experiment = self._experiment()
        run_id = self._known(run.run_id) or self._find(experiment, run.key)
        if run_id is None:
            tags = {
                KEY_TAG: run.key,
                STATUS_TAG: "RUNNING",
                "mlflow.source.name": "muster",
                "mlflow.source.type": "JOB",
            }
            with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
                tags["mlflow.user"] = getpass.getuser()
            created = self._client.create_run(
                experiment.experiment_id, start_time=int(run.started * 1000), tags=tags, run_name=run.name
            )
            self._run_id = created.info.run_id
            self._show_under(experiment, run.parent)
            return Sent(self._run_id, -1, -1, experiment.experiment_id)
        self._run_id = run_id
        self._show_under(experiment, run.parent)
        self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(run_id, STATUS_TAG, "RUNNING")
        known = self._client.get_run(run_id)
        if REASON_TAG in known.data.tags:
            self._client.delete_tag(run_id, REASON_TAG)
        # The attempt and the evaluated weight are never null, as a loss that is not finite is. Runs begun under an
        # older version have them under the record's names, and so have tasks that do not count tokens.
        step = max(self._last_step(NAMES["attempt"]), self._last_step("attempt"))
        held = [key for key in known.data.metrics if key.startswith("eval_")]
        evaluation = max(map(self._last_step, [NAMES["eval_tokens"], *held]))
        return Sent(run_id, step, evaluation, known.info.experiment_id)

    def _show_under(self, experiment: Experiment, parent: str | None) -> None:
        if parent and (found := self._find(experiment, parent)):
            self._client.set_tag(self._run_id, MLFLOW_PARENT_RUN_ID, found)

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, str], inputs: Sequence[Input]) -> None:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in params.items()}
        data = self._client.get_run(self._run_id).data
        known, tagged = data.params, data.tags
        if MARK not in tagged.get(MLFLOW_RUN_NOTE, MARK):  # the user has written another on MLflow's page
            tags = {key: text for key, text in tags.items() if key != MLFLOW_RUN_NOTE}
        for key in tags:
            if not tags[key] and key in tagged:
                self._client.delete_tag(self._run_id, key)
        texts = {key: text[:MAX_PARAM_VAL_LENGTH] for key, text in texts.items()}
        changed = {f"changed.{key}": text for key, text in texts.items() if known.get(key, text) != text}
        self._client.log_batch(
            self._run_id,
            params=[Param(key, text) for key, text in texts.items() if key not in known],
            tags=[RunTag(key, text) for key, text in (changed | dict(tags)).items() if text],
        )
        datasets = [
            DatasetInput(
                Dataset(
                    name=item.name,
                    digest=item.digest[:MAX_DATASET_DIGEST_SIZE],
                    source_type="local",
                    source=json.dumps({"uri": item.source}),
                    profile=json.dumps({"sha256": item.digest, **item.profile}),
                ),
                [InputTag("mlflow.data.context", item.kind)],
            )
            for item in inputs
        ]
        if datasets:
            self._client.log_inputs(self._run_id, datasets)

    def log(self, points: Sequence[Point]) -> None:
        batch: list[Metric] = []
        for point in points:
            time = int(point.time * 1000)
            metrics = [Metric(_metric_name(key), value, time, point.step) for key, value in point.values.items()]
            assert len(metrics) <= MAX_METRICS_PER_BATCH, "all metrics of a step must fit into one transaction"
            if len(batch) + len(metrics) > MAX_METRICS_PER_BATCH:
                self._client.log_batch(self._run_id, metrics=batch)
                batch = []
            batch += metrics
        self._client.log_batch(self._run_id, metrics=batch)

    def artifact(self, path: Path, folder: str) -> None:
        if not self._place_is_checked:
            place = self._client.get_run(self._run_id).info.artifact_uri
            if is_local_uri(place):
                refuse_elsewhere(Path(local_file_uri_to_path(place)), self._run_id)
            self._place_is_checked = True
        self._client.log_artifact(self._run_id, str(path), folder or None)

    def finish(self, status: str, time: float, reason: str | None) -> None:
        for key, text in ((STATUS_TAG, status), (REASON_TAG, reason)):
            if text:
                self._client.set_tag(self._run_id, key, text)
        # MLflow has no status for a run that was stopped on purpose.
        self._client.set_terminated(self._run_id, "KILLED" if status == "STOPPED" else status, int(time * 1000))

    def _experiment(self) -> Experiment:
        found = self._client.get_experiment_by_name(self._experiment_name)
        if found is None:
            location = None if self._artifact_root is None else self._artifact_root.resolve().as_uri()
            with contextlib.suppress(MlflowException):  # another run made it just now
                self._client.create_experiment(self._experiment_name, artifact_location=location)
            found = self._client.get_experiment_by_name(self._experiment_name)
        if found is None or found.lifecycle_stage != "active":
            raise RuntimeError(
                f"MLflow experiment {self._experiment_name!r} was deleted: restore it or set tracking.experiment"
            )
        if KIND_TAG not in found.tags:  # otherwise its page is for GenAI traces until somebody changes that
            with contextlib.suppress(MlflowException):  # not everybody may change an experiment
                self._client.set_experiment_tag(found.experiment_id, KIND_TAG, TRAINING)
        return found

    def _known(self, run_id: str | None) -> str | None:
        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run_id if run.info.lifecycle_stage == "active" else None

    def _find(self, experiment: Experiment, key: str) -> str | None:
        query = f"tags.`{KEY_TAG}` = '{key}'"
        found = self._client.search_runs([experiment.experiment_id], query, ViewType.ACTIVE_ONLY, max_results=1)
        return found[0].info.run_id if found else None

    def _last_step(self, key: str) -> int:
        return max((metric.step for metric in self._client.get_metric_history(self._run_id, key)), default=-1)


def _metric_name(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key)[:250]


@contextlib.contextmanager
def _schema_lock(uri: str) -> Iterator[None]:
    """A lock on creating the tables of an SQLite file, at which two runs at once would both fail."""
    if not uri.startswith(SQLITE):
        yield
        return
    path = Path(f"{sqlite_path(uri)}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path):
        yield
