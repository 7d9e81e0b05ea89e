"""On request: a torch trace and a memory snapshot over a range of steps, written beside the run."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from configs.sections.train import ProfileConfig
from trainer.files.own_files import write_text
from trainer.record.lines import Record

from .held_out import if_there_is_room


class Profiler:
    """Profiles the steps that `train.profile` names and writes to `RUN/profiles/`; idle otherwise."""

    def __init__(self, run_dir: Path, config: ProfileConfig, enabled: bool):
        self._run_dir = run_dir
        self._config = config if enabled else config.model_copy(update={"start": None})
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        if step == self._config.start and self._profile is None:  # a rollback can come here twice
            if torch.cuda.is_available():
                torch.cuda.memory._record_memory_history()
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, profile_memory=True, record_shapes=True)
            self._profile.start()

    def ends(self, step: int) -> bool:
        """Whether this is the last step to be profiled."""
        start, steps = self._config.start, self._config.steps
        return self._profile is not None and start is not None and step >= start + steps - 1

    def after(self, step: int, record: Record | None) -> None:
        """Call at the end of every step; after the last profiled one, write the files and name them in the record."""
        if self._profile is None or not self.ends(step):
            return
        self._profile.stop()
        folder = self._run_dir / "profiles"
        name = f"steps-{self._config.start}-{step}"
        trace, table = folder / f"{name}.trace.json.gz", folder / f"{name}.memory.txt"
        snapshot = folder / f"{name}.memory.pickle"  # the format of pytorch.org/memory_viz
        with if_there_is_room(record, folder / name):
            folder.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(trace))
            order = "self_cuda_memory_usage" if torch.cuda.is_available() else "self_cpu_memory_usage"
            write_text(table, self._profile.key_averages().table(sort_by=order, row_limit=60))
            if torch.cuda.is_available():
                torch.cuda.memory._dump_snapshot(str(snapshot))
            written = [str(path.relative_to(self._run_dir)) for path in (trace, table, snapshot) if path.exists()]
            if record:
                record.event("profile", step=step, files=written)
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
