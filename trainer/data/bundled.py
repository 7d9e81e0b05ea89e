"""Small data sets that need no download, written as Parquet on first use: scikit-learn's, Python's, and made ones."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import Config
from configs.sections.data import BUNDLED, DataConfig
from trainer.files.durable import replacing

from .graphs.functions import syntax_trees
from .images.glyphs import glyphs
from .pairs.dates import dates
from .series.pendulums import pendulums
from .texts.packages import functions

SIDE = 32
"""Points of the grid of exclusive or, in each direction."""


def at_hand(config: Config) -> DataConfig:
    """`config.data` with the file, under run.root/data, of a bundled data set in `path`. It is written if it is not
    there; any number of processes may do so at once. Raises OSError."""
    name = config.data.path
    if not isinstance(name, str) or name not in BUNDLED:
        return config.data
    file = Path(config.run.root) / "data" / f"{name.partition(':')[2]}.parquet"
    if not file.is_file():
        table = _MAKE[name]()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(file) as opened:
            pq.write_table(table, opened)
    return config.data.model_copy(update={"path": str(file)})


def _xor() -> pa.Table:
    """Points of a grid over the square from -1 to 1; class 1 if their coordinates differ in sign."""
    middles = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    x, y = (each.ravel() for each in np.meshgrid(middles, middles))
    return pa.table({"x": x, "y": y, "label": ((x > 0) != (y > 0)).astype(np.int64)})


def _wine() -> pa.Table:
    """178 wines: 13 measurements, and which of three growers."""
    from sklearn.datasets import load_wine  # a second to import, which other data need not wait for

    return _table(load_wine())


def _diabetes() -> pa.Table:
    """442 patients: 10 measurements, and the disease's progression in a year."""
    from sklearn.datasets import load_diabetes

    return _table(load_diabetes(scaled=False))


def _karate() -> pa.Table:
    """Zachary's karate club (1977): 34 members, who met whom, and which of two clubs each joined when it split."""
    from networkx import karate_club_graph

    club = karate_club_graph()
    edges = [(a, b) for pair in club.edges for a, b in (pair, pair[::-1])]
    joined = [int(club.nodes[member]["club"] == "Officer") for member in club]
    ends = [list(each) for each in zip(*edges, strict=True)]
    return pa.table({"edge_index": [ends], "node_feat": [[[member] for member in club]], "y": [joined]})


def _table(found) -> pa.Table:
    features = dict(zip(found.feature_names, found.data.T, strict=True))
    return pa.table({**features, "label": found.target})


def _digits() -> pa.Table:
    """1,797 handwritten digits of 8 x 8 pixels, as grey PNG."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    images = []
    for number, pixels in enumerate(found.images):  # 0 to 16
        Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(png := io.BytesIO(), "PNG")
        images.append({"bytes": png.getvalue(), "path": f"{number}.png"})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(images, kind), "label": pa.array(found.target, pa.int64())})


_MAKE: dict[str, Callable[[], pa.Table]] = {
    "bundled:xor": _xor,
    "bundled:wine": _wine,
    "bundled:diabetes": _diabetes,
    "bundled:digits": _digits,
    "bundled:functions": syntax_trees,
    "bundled:dates": dates,
    "bundled:karate": _karate,
    "bundled:packages": functions,
    "bundled:glyphs": glyphs,
    "bundled:pendulums": pendulums,
}
