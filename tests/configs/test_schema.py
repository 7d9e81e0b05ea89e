"""The JSON Schema that `muster config --schema` prints: every key, each with a description."""

from collections.abc import Iterator

import pytest

from configs import Config

STABLE = {
    "run": ["name", "root", "seed"],
    "train": ["steps", "global_batch", "micro_batch", "seq_len", "precision"],
    "model": ["family", "num_layers", "hidden_size", "num_experts", "top_k"],
    "optim": ["name", "lr", "schedule"],
    "parallel": ["dp", "tp", "pp", "ep", "sp", "zero_stage"],
    "checkpoint": ["every", "keep"],
    "data": ["path"],
    "tracking": ["uri", "experiment"],
}
"""Keys that scripts use."""


def keys(schema: dict, part: dict, prefix: str = "") -> Iterator[tuple[str, dict]]:
    """(dotted key, its schema) of everything that is no section."""
    for name, value in part["properties"].items():
        below = [value, *value.get("anyOf", ())]
        sections = [schema["$defs"][item["$ref"].rpartition("/")[2]] for item in below if "$ref" in item]
        if sections:
            yield from keys(schema, sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name, value


SCHEMA = Config.model_json_schema()
KEYS = dict(keys(SCHEMA, SCHEMA))


@pytest.mark.parametrize("section", STABLE)
def test_stable_keys(section):
    assert {f"{section}.{key}" for key in STABLE[section]} <= KEYS.keys()


def test_every_key_has_a_description_and_a_default():
    assert [key for key, value in KEYS.items() if not value.get("description")] == []
    # A stretch of no factor is none, which is what leaving out the section means.
    assert [key for key, value in KEYS.items() if "default" not in value] == ["model.rope_scaling.factor"]


def test_every_section_says_what_it_is():
    lists = [name for name, section in SCHEMA["$defs"].items() if section.get("additionalProperties") is not False]
    assert lists == [], "a section that takes any key"


def test_choices_are_in_the_schema():
    assert KEYS["train.precision"]["enum"] == ["fp32", "bf16", "fp16", "fp8"]
    assert KEYS["train.steps"]["exclusiveMinimum"] == 0
