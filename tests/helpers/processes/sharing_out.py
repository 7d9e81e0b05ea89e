"""Which process runs which tests, when pytest-xdist runs them in several."""

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parents[3]


class OneRay(LoadFileScheduling):
    """All tests of a file run in one process, as they share fixtures; so do all files that start a Ray.

    Not by `--dist loadgroup`: xdist 3.8 groups nothing under pytest 9.2, and does not say so.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "ray" if starts_ray(ROOT / file) else file


@cache
def starts_ray(file: Path) -> bool:
    # By its text: the process that shares out the tests imports none of them, and so sees no marker.
    return "pytest.mark.ray" in file.read_text()
