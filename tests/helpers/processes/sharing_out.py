"""Which process runs which tests, when pytest-xdist runs them in several."""

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parents[3]


class OneRay(LoadFileScheduling):
    """Runs all tests of a file in one process, since they share fixtures, and all files that start Ray in one process.

    `--dist loadgroup` would not do: under pytest 9.2, xdist 3.8 silently groups nothing.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "ray" if starts_ray(ROOT / file) else file


@cache
def starts_ray(file: Path) -> bool:
    # Searches the text: the process that distributes tests does not import them, and so sees no markers.
    return "pytest.mark.ray" in file.read_text()
