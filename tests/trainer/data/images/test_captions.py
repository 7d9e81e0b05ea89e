"""Images with a text each: which text belongs to which image, how much of it is read, and what is refused."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import write_images

from configs import ConfigError
from configs.sections.data import DataConfig
from trainer.data import parquet_files
from trainer.data.images.captions import Captions


def captions(path, said, length=8, **keys):
    """Each image's label is the number of its row."""
    write_images(path, count=len(said))
    table = pq.read_table(path).set_column(1, "label", pa.array(range(len(said)))).append_column("text", said)
    pq.write_table(table, path, row_group_size=3)
    return Captions(DataConfig(path=str(path), prepare={"held_out": 0}, images=keys), 0, length=length)


def test_each_image_has_its_text(tmp_path):
    said = [f"{number} \u00e9" + "x" * number for number in range(10)] + [None]
    batch = captions(tmp_path / "x.parquet", pa.array(said)).examples([*range(11), -1])
    assert sorted(batch.labels.tolist()) == [-1, *range(11)]
    for label, row in zip(batch.labels.tolist(), batch.text_ids.tolist(), strict=True):
        text = (said[label] or "").encode()[:8] if label >= 0 else b""
        assert row == [*(byte + 1 for byte in text), *[0] * (8 - len(text))]


def test_what_is_refused(tmp_path, monkeypatch):
    path, said = tmp_path / "x.parquet", pa.array(["x" * 1000] * 9)
    with pytest.raises(ConfigError, match=r"has no column said .*: set data\.images\.caption"):
        captions(path, said, caption="said")
    with pytest.raises(ConfigError, match=r"column label is int64, not text: set data\.images\.caption"):
        captions(path, said, caption="label")
    for empty in ([None] * 9, [""] * 9):
        with pytest.raises(ConfigError, match=r"column text has no text: set data\.images\.caption"):
            captions(path, pa.array(empty, pa.string()))
    monkeypatch.setattr(parquet_files, "MOST_BYTES", 5000)  # of which the images are no part
    with pytest.raises(ConfigError, match="the captions take over 5,000 bytes of memory"):
        captions(path, said)
    assert len(captions(path, pa.array(["short"] * 9))) == 9
