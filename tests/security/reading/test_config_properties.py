"""Of any input that hypothesis finds: a config or a ConfigError of at most three lines, and nothing else."""

import contextlib
import json
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from configs import Config, ConfigError, from_dict, load, preset_names, resolve, to_yaml
from configs.load import read_tree
from configs.reading.parse import parse_json, parse_yaml
from configs.sweep.definition import SweepConfig, sweep_from_dict
from models.hf.config_json import from_hf_config
from models.planning.cost import has_formulas
from models.planning.devices import DEVICES
from models.planning.plan import predict

quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)
NAMES = ["quickstart", "null", "a", "", "stdlib", "auto", "yarn", "a\0b", "\x1b[2J", "\ud800", "x" * 300, "../..", "~x"]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 20), st.floats(), st.text(max_size=8),
    st.sampled_from(NAMES),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 10**4000, 1e-320, 1e300, float("inf"), float("nan")]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


def keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The place of every key, sections included."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys(part, (*prefix, name))


def put(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for part in place[:-1]:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[place[-1]] = value


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Lets a ConfigError pass that a person can read."""
    said = "said nothing wrong"
    with contextlib.suppress(ConfigError):
        try:
            yield
        except ConfigError as error:
            said = str(error)
            raise
    lines = said.splitlines()
    assert 1 <= len(lines) <= 3, said
    assert max(map(len, lines)) < 1500, said


@contextlib.contextmanager
def as_config_error() -> Iterator[None]:
    """Makes a ConfigError of a ValueError, as its callers do."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None


def use(tree: Any) -> None:
    """All that a command does with a config before it starts anything."""
    with told():
        config = from_dict(tree)
        json.dumps(parse_yaml(to_yaml(config)))
        assert from_dict(parse_yaml(to_yaml(config))) == config
        resolved, _ = resolve(config, vocab_size=320)
        if has_formulas(resolved.model):
            json.dumps(predict(resolved, DEVICES["h100"]).summary(), allow_nan=False)


@pytest.mark.slow
@quick
@given(st.sampled_from(preset_names()), st.lists(st.tuples(st.sampled_from(list(keys(Config))), values), max_size=4))
def test_presets_with_any_values(preset, changes):
    tree = read_tree(preset)
    for place, value in changes:
        put(tree, place, value)
    use(tree)


numbers = st.sampled_from([1, 2, 3, 4, 7, 8, 64, 1000, 2**20, 2**24, 2**30, 2**62, 1e-9, 0.5, 1e29])
NUMERIC = [place for place in keys(Config) if place[0] in ("model", "train", "parallel", "optim", "data")]


@quick
@given(st.lists(st.tuples(st.sampled_from(NUMERIC), numbers), min_size=1, max_size=6))
def test_presets_with_extreme_sizes(changes):
    tree = read_tree("quickstart")
    for place, value in changes:
        put(tree, place, value)
    use(tree)


@quick
@given(values)
def test_any_tree(tree):
    use(tree)


SYNTAX = [
    "a", "b: ", "- ", "[", "]", "{", "}", ", ", "\n", "  ", "&x ", "*x", "<<: ", "!!int ", "!!binary ", "? ", "| ", "'",
    '"', "\\u0000", "1", ".inf", "1:30", "0x", "---\n", "%TAG", "#", "2026-01-05", "run: ", "\ufeff", "true",
]  # fmt: skip


@settings(quick, max_examples=200)
@given(st.lists(st.sampled_from(SYNTAX), max_size=14).map("".join) | st.text(max_size=30))
@example("!!int ''")
@example("a: 0x_")
@example("a: 2026-13-45")
@example("? [a]\n: b")
def test_any_text_as_yaml(text):
    with told(), as_config_error():
        found = parse_yaml(text)
        json.dumps(found)
        if isinstance(found, dict):
            use(found)
    with told():
        load("quickstart", [text, f"train={text}", f"run.name={text}"])


@quick
@given(st.text(max_size=30) | values.map(lambda value: json.dumps(value, default=str)[:200]))
def test_any_text_as_json(text):
    with told(), as_config_error():
        parse_json(text)


@quick
@given(st.lists(st.tuples(st.sampled_from(list(keys(SweepConfig))), values), max_size=4))
def test_any_sweep(changes):
    tree: dict[str, Any] = {"base": "quickstart", "isoflop": {"budgets": [1e15]}}
    for place, value in changes:
        put(tree, place, value)
    with told():
        sweep_from_dict(tree)


LLAMA = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 10000.0, "hidden_act": "silu",
    "rope_scaling": None, "rope_parameters": None, "attention_bias": False,
}  # fmt: skip
MOE = LLAMA | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": True, "sliding_window": 4,
    "max_window_layers": 0, "layer_types": None, "shared_expert_intermediate_size": 8, "qkv_bias": False,
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0, "partial_rotary_factor": 1.0, "num_local_experts": 4, "use_qk_norm": True,
}  # fmt: skip
KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "dots1")
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "yarn", "default"]) | scalars},
    optional=dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                            "original_max_position_embeddings", "rope_theta", "truncate"), scalars | numbers),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_next_test_changes_is_read(kind):
    assert from_hf_config(MOE | {"model_type": kind})[0].num_layers == 2


@settings(quick, max_examples=200)
@given(
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(list(MOE)), values | numbers | ropes, max_size=3),
    st.sets(st.sampled_from(list(MOE)), max_size=2),
)
def test_any_hugging_face_config(kind, changes, left_out):
    tree = {key: value for key, value in (MOE | {"model_type": kind} | changes).items() if key not in left_out}
    with told():
        model, _ = from_hf_config(tree)
        use({"model": model.model_dump(mode="json"), "train": {"seq_len": 1}})


@quick
@given(values)
def test_any_tree_as_a_hugging_face_config(tree):
    with told():
        from_hf_config(tree)


ROOT = Path(__file__).parents[3]
AS_A_CHILD = """
import resource, sys
from configs import ConfigError, load, resolve
from configs.load import read_mapping
from models.hf.config_json import from_hf_config
from configs.reading.parse import parse_json
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (500 * 2**20,) * 2)
for name in sys.argv[1:]:
    try:
        if name.endswith("yaml"):
            resolve(load(name), vocab_size=320)
        else:
            from_hf_config(parse_json(Path(name).read_text()))
    except (ConfigError, ValueError) as error:
        print(len(str(error).splitlines()))
"""


@pytest.mark.slow
def test_bombs_of_many_kinds_in_a_child_process(tmp_path):
    """Each of these took all memory there was, or did not end."""
    bombs = {
        "merge.yaml": "a: &a {k: 1}\n" + "".join(f"x{i}: &a {{<<: [*a, *a, *a, *a], k{i}: 1}}\n" for i in range(40)),
        "list.yaml": "a: &a [x]\n" + "".join(f"x{i}: &a [*a, *a, *a, *a]\n" for i in range(40)) + "plugins: *a\n",
        "keys.yaml": "".join(f"? [{'a, ' * 100}]\n: 1\n" for _ in range(1000)),
        "scalars.yaml": "plugins: [" + "a," * 250_000 + "]\n",
        "anchors.yaml": "".join(f"k{i}: &a{i} {{a: 1}}\n" for i in range(15_000)),
        "layers.yaml": "base: quickstart\nmodel: {num_layers: 1000000000, moe_every: 999999999}\n",
        "blocks.yaml": "base: quickstart\ntrain: {seq_len: 1000000000}\nmodel: {block_sparse: {block: 1, stride: 1}}\n",
        "workers.yaml": "base: quickstart\nparallel: {dp: 1048576, ep: 999983}\ntrain: {global_batch: 1048576}\n",
        "layers.json": json.dumps(MOE | {"model_type": "qwen3", "num_hidden_layers": 10**9}),
        "types.json": json.dumps(MOE | {"model_type": "qwen3", "layer_types": ["full_attention"] * 200_000}),
        "dense.json": json.dumps(MOE | {"model_type": "qwen3_moe", "mlp_only_layers": list(range(200_000))}),
        "deep.json": "[" * 1_000_000,
        "keys.json": "{" + ", ".join(f'"k{i}": 1' for i in range(200_000)) + ', "k0": 2}',
    }
    for name, text in bombs.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", AS_A_CHILD, *map(str, map(tmp_path.joinpath, bombs))], cwd=ROOT, text=True,
        capture_output=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    counts = list(map(int, done.stdout.split()))
    assert len(counts) in (len(bombs), len(bombs) - 1)  # long attention in blocks is allowed
    assert max(counts) <= 3
