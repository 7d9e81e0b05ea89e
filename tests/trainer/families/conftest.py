"""Images, and runs of the plugins' families that learn from them."""

from pathlib import Path

import pytest
from pictures import write_images
from plugin_runs import MODELS, make
from support import train_in_process


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "images.parquet")


@pytest.fixture(scope="session")
def clean(tmp_path_factory, images) -> dict[str, Path]:
    """A run of each family, never stopped, in one process."""
    runs = {family: make(family, tmp_path_factory.mktemp("clean"), images) for family in MODELS}
    for run_dir in runs.values():
        assert train_in_process(run_dir) == 0
    return runs
