"""Images: augmentation as a function of seed and index, labels that are missing, images that cannot be decoded."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import png, write_images

from configs import ConfigError, from_dict
from configs.sections.data import DataConfig, ImagesConfig
from trainer.data.images.augment import augmented
from trainer.data.images.reader import Images, WrongSize
from trainer.data.kinds import kind_of
from trainer.data.read.shards import DataError


def images(path, split="train", seed=0, skip=False, **keys):
    how = {"images": {"channels": 1} | keys, "on_bad_page": "skip" if skip else "stop"}
    return Images(DataConfig(path=str(path), **how), seed, split)


def spoilt(path, rows, column):
    """The file again with nothing, or with bytes that are no image, in some rows of a column."""
    table = pq.read_table(path).to_pydict()
    for row in rows:
        table[column][row] = None if column == "label" else {"bytes": b"no image", "path": "x.png"}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(table["image"], kind), "label": pa.array(table["label"], pa.int64())}
    pq.write_table(pa.table(columns), path, row_group_size=16)
    return path


def test_augmentation_is_a_function_of_seed_and_index(tmp_path):
    path = write_images(tmp_path / "x.parquet")
    plain, one, again = images(path), images(path, crop=2, flip=True), images(path, crop=2, flip=True)
    indices = list(range(40))
    found = one.examples(indices)
    assert torch.equal(found.images[7:9], again.examples([7, 8]).images)
    assert not torch.equal(found.images, images(path, seed=1, crop=2, flip=True).examples(indices).images)
    assert torch.equal(found.labels, plain.examples(indices).labels)
    assert not torch.equal(one.examples([len(one) + 3]).images, one.examples([3]).images)
    moved = 0
    for image, before in zip(found.images, plain.examples(indices).images, strict=True):
        padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
        windows = {(top, left): padded[:, top : top + 12, left : left + 12] for top in range(5) for left in range(5)}
        places = [(place, False) for place, window in windows.items() if torch.equal(image, window)]
        places += [(place, True) for place, window in windows.items() if torch.equal(image, window.flip(2))]
        assert len(places) == 1
        moved += places != [((2, 2), False)]
    assert moved > 30
    held_out = images(path, "held_out", crop=2, flip=True)
    assert torch.equal(held_out.examples([0, 1]).images, images(path, "held_out").examples([0, 1]).images)


def test_colours_change_by_seed_and_index(tmp_path):
    path = write_images(tmp_path / "x.parquet")
    plain, one = images(path, channels=3), images(path, channels=3, jitter=0.4)
    found, before = one.examples(range(40)).images.float(), plain.examples(range(40)).images.float()
    assert torch.equal(images(path, channels=3, jitter=0.4).examples([7]).images[0], found[7].byte())
    assert not torch.equal(one.examples([len(one) + 3]).images, one.examples([3]).images)
    # Of grey pixels saturation changes nothing, and neither contrast nor saturation changes the mean.
    assert torch.equal(found[:, 0], found[:, 2])
    unclipped = (found > 0).flatten(1).all(1) & (found < 255).flatten(1).all(1)
    factors = (found.mean((1, 2, 3)) / before.mean((1, 2, 3)))[unclipped]
    assert len(factors) > 5
    assert 0.59 < factors.min() < 0.8
    assert 1.0 < factors.max() < 1.41
    held_out = images(path, "held_out", channels=3, jitter=0.4).examples([0, 1]).images
    assert torch.equal(held_out, images(path, "held_out", channels=3).examples([0, 1]).images)
    red = augmented(np.full((3, 2, 2), 100, np.uint8) * np.array([1, 0, 0], np.uint8)[:, None, None],
                    ImagesConfig(jitter=0.4), 1)  # fmt: skip
    assert len(np.unique(red)) == 2
    assert red[1].max() != 0 or red[0].max() != 100


def test_none_are_held_out_where_none_are_asked_for(tmp_path):
    path = write_images(tmp_path / "train.parquet")
    data = {"path": str(path), "kind": "images", "images": {"channels": 1}, "prepare": {"held_out": 0}}
    config = from_dict({"model": {"family": "mlp", "inputs": 144, "outputs": 3}, "data": data})
    assert kind_of(config).open(config, "held_out") is None
    assert len(kind_of(config).open(config, "train")) == 96
    write_images(tmp_path / "validation.parquet", 7)
    beside = from_dict(config.model_dump() | {"data": data | {"path": str(tmp_path)}})
    assert [len(kind_of(beside).open(beside, split)) for split in ("train", "held_out")] == [96, 7]


def test_images_without_a_label_are_counted_and_left_out(tmp_path):
    path = write_images(tmp_path / "x.parquet")
    before = [images(path, split) for split in ("train", "held_out")]
    spoilt(path, (3, 20, 21), "label")
    after = [images(path, split) for split in ("train", "held_out")]
    assert sum(map(len, before)) - sum(map(len, after)) == 3
    config = from_dict({
        "model": {"family": "mlp", "inputs": 144, "outputs": 3},
        "data": {"kind": "images", "path": str(path), "images": {"channels": 1}},
    })  # fmt: skip
    _, notes = kind_of(config).ensure(config)
    assert notes[1] == "3 images left out, without a label: the first is x.parquet, row 3"
    for each in after:
        labels = each.examples(range(len(each))).labels
        assert (labels >= 0).all()


def test_an_image_that_cannot_be_decoded_stops_the_run_or_weighs_nothing(tmp_path):
    path = spoilt(write_images(tmp_path / "x.parquet"), (20,), "image")
    with pytest.raises(DataError, match=r"row 4 is not a readable PNG or JPEG"):
        (found := images(path)).examples(range(len(found)))
    skipping = images(path, skip=True)
    batch = skipping.examples(range(len(skipping)))
    [bad] = torch.where(batch.labels < 0)[0].tolist()
    assert batch.example_ids.tolist() == [i if i != bad else -1 for i in range(len(skipping))]
    assert batch.weight() == len(skipping) - 1
    assert skipping.bad_pages == [(str(path), 1)]
    everything = spoilt(path, range(96), "image")
    with pytest.raises(ConfigError, match="not a readable PNG"):
        images(everything)
    with pytest.raises(ConfigError, match="none of the first 16 images can be decoded"):
        images(everything, skip=True)


def test_images_of_several_sizes_are_refused_before_a_run_unless_they_are_resized(tmp_path):
    path, kind = write_images(tmp_path / "x.parquet"), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pq.read_table(path).to_pydict()
    table["image"][37] = {"bytes": png(np.zeros((12, 20), np.uint8)), "path": "x.png"}
    pq.write_table(
        pa.table({"image": pa.array(table["image"], kind), "label": table["label"]}), path, row_group_size=16
    )
    tree = {"model": {"family": "convnet", "stages": [{"width": 4}], "channels": 1, "outputs": 3}, "data": {}}
    tree["data"] = {"path": str(path), "images": {"channels": 1}, "prepare": {"held_out": 0.0}}
    config = from_dict(tree)
    message = r"row 5 has 20 x 12 pixels, others 12 x 12: set data\.images\.size=12, which resizes all$"
    with pytest.raises(ConfigError, match=message):
        kind_of(config).ensure(config)
    with pytest.raises(WrongSize, match=message):
        (found := images(path)).examples(range(len(found)))
    tree["data"]["images"]["size"] = 12
    config = from_dict(tree)
    assert "96 images of 1 x 12 x 12" in kind_of(config).ensure(config)[1][0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architecture": "vgg11"}, r"images of 12 x 12, too small .* need 32 x 32: set data\.images\.size=32"),
        ({"channels": 3}, r"model\.channels is 3, but data\.images\.channels is 1"),
        ({"outputs": 2}, r"model\.outputs is 2, but .* labels up to 2: set model\.outputs=3"),
    ],
)
def test_a_convnet_that_does_not_fit_the_images_is_refused(tmp_path, keys, message):
    path = write_images(tmp_path / "x.parquet", 6)
    tree = {
        "model": {"family": "convnet", "channels": 1, **keys},
        "data": {"path": str(path), "images": {"channels": 1}},
    }
    config = from_dict(tree)
    with pytest.raises(ConfigError, match=message):
        kind_of(config).ensure(config)
