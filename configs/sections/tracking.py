"""Where the record of a run is shown: MLflow, fed from the run's own metrics.jsonl."""

from pydantic import PositiveFloat

from configs.base import Section


class TrackingConfig(Section):
    enabled: bool = True
    """False: metrics.jsonl and events.jsonl only."""
    uri: str | None = None
    """MLflow tracking URI; None: MLFLOW_TRACKING_URI, else SQLite beside the runs (run.root/mlflow.db), of a
    sweep beside its folder."""
    experiment: str = "muster"
    """MLflow experiment that the run stands in."""
    interval: PositiveFloat = 5.0
    """Seconds between two sends."""
    export_model: bool = True
    """Log the final model, in Hugging Face format, as an artifact."""
    parent: str | None = None
    """Folder of the sweep that the run is part of: it stands under the sweep in MLflow, and what sends the sweep's
    record sends this one's."""
