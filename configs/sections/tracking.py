"""Where a run is tracked: MLflow, fed from the run's own metrics.jsonl."""

from pydantic import PositiveFloat

from configs.base import Section


class TrackingConfig(Section):
    enabled: bool = True
    """False: metrics.jsonl and events.jsonl only."""
    uri: str | None = None
    """MLflow tracking URI; None: MLFLOW_TRACKING_URI, else SQLite beside the runs (run.root/mlflow.db); for a sweep,
    beside its folder."""
    experiment: str = "muster"
    """MLflow experiment of the run."""
    interval: PositiveFloat = 5.0
    """Seconds between two uploads."""
    export_model: bool = True
    """Log the final model, in Hugging Face format, as an artifact."""
    parent: str | None = None
    """Folder of the sweep that the run belongs to: it is nested under the sweep in MLflow, and the sweep's shipper
    uploads it too."""
