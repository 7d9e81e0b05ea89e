"""Small real inputs, and one prepared folder that the tests of this directory read."""

from pathlib import Path

import pytest
from data_inputs import SMALL, make_text

from trainer.data.manifest import Manifest, read_manifest
from trainer.data.prepare.prepare import prepare


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    return {f"{number:03d}.txt": make_text(number, 20 + 37 * number % 900) for number in range(60)}


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, raw: Path) -> Path:
    """Byte-level tokens in row groups of 1000, the last one shorter. Read only."""
    out = tmp_path_factory.mktemp("prepared") / "small"
    prepare([raw], out, SMALL, workers=1, progress=False)
    return out


@pytest.fixture
def manifest(prepared: Path) -> Manifest:
    return read_manifest(prepared)
