"""The planner as a form: the numbers of `muster plan`, its messages, and nothing of a config that is read or run."""

import builtins
import json
import shlex
import time

import pytest
from dashboards import serving

from configs import ConfigError, load, preset_names
from configs.load import load_apart


@pytest.fixture(scope="module")
def dashboard(root):
    with serving([root]) as server:
        yield server


FORMS = [
    {"preset": "moe-8x7b", "gpus": 64, "usd_per_gpu_hour": 2.5},
    {"preset": "dense-7b", "gpus": 8, "gpu": "b200", "overrides": ["train.micro_batch=2", "train.precision=bf16"]},
    {"preset": "quickstart", "gpu": "cpu", "overrides": ["train.seq_len=128", "run.name=mine"]},
    {"text": "base: quickstart\nmodel: {vocab_size: 8192}\ntrain: {steps: 7}\n", "gpu": "cpu"},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_are_those_of_the_command(dashboard, muster, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(form.get("text", ""))
    told = dashboard.post("/api/plan", form).json
    code, out, err = muster(*shlex.split(told["commands"]["plan"])[1:], "--json")
    assert (code, err) == (0, "")
    known = json.loads(out)
    assert {key: told["plan"][key] for key in known} == known
    assert sum(size for _, size in told["plan"]["parts"]) >= known["memory"]["peak"]
    code, out, _ = muster(*shlex.split(told["commands"]["plan"])[1:])
    for name, _ in told["plan"]["parts"]:
        assert name in out
    assert all(note in out for note in told["notes"])
    for verb in ("train", "submit"):
        _, _, name, *keys = shlex.split(told["commands"][verb])
        run = load(name, keys)
        used = {"parallel.dp": run.parallel.dp, "train.steps": run.train.steps, "run.name": run.run.name}
        assert used == {key: told["used"][key] for key in used}


def test_every_preset_that_is_offered_can_be_planned(dashboard):
    offered = dashboard.get("/api/plan").json["presets"]
    assert {"quickstart", "moe-8x7b"} <= set(offered) < set(preset_names())
    assert all("plan" in dashboard.post("/api/plan", {"preset": name}).json for name in offered)


def test_topologies_are_those_of_the_search(dashboard, muster):
    form = {"preset": "quickstart", "gpu": "cpu", "gpus": 2, "overrides": ["train.seq_len=128"]}
    until = time.monotonic() + 120
    while (told := dashboard.post("/api/plan/topologies", form).json)["working"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    options = ("--gpu", "cpu", "--gpus", "2", "--search", "--json")
    code, out, _ = muster("plan", "quickstart", "train.seq_len=128", *options)
    assert code == 0
    assert told["found"] == json.loads(out)
    assert told["found"]["choices"]


MISTAKES = [
    ({"preset": "moe-8x7b", "gpus": 7, "overrides": ["parallel.tp=2"]}, "--gpus", "is not a multiple of parallel.tp"),
    ({"preset": "moe-8x7b", "gpus": 0}, "--gpus", "should be 1 to"),
    ({"preset": "moe-8x7b", "gpu": "tpu"}, "--gpu", "should be one of h100"),
    ({"preset": "moe-8x7b", "usd_per_gpu_hour": -1}, "--usd-per-gpu-hour", "should be a price"),
    ({"preset": "quickstart", "overrides": ["train.steps=x"]}, "train.steps", "should be a whole number"),
    ({"preset": "quickstart", "overrides": ["train.stepz=3"]}, "train.stepz", "did you mean"),
    ({"preset": "quickstart", "overrides": ["x"]}, None, "is not key=value"),
    ({"preset": "quickstart", "overrides": ["parallel.ep=3"]}, "parallel.ep", "must divide"),
    ({"preset": "none"}, None, "choose one of dense-7b"),
    ({"text": "a: [1,\n b: }"}, None, "cannot be read as YAML"),
    ({"text": "- 1"}, None, "not a mapping of sections"),
    ({"text": "grid: {}"}, None, "is a sweep"),
    (
        {"text": "model: {family: mlp, inputs: 8, outputs: 2}"},
        "model.family",
        "the planner's formulas cover decoders only",
    ),
]


@pytest.mark.parametrize(("form", "key", "words"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_message_with_its_key(dashboard, form, key, words):
    answer = dashboard.post("/api/plan", form)
    assert (answer.status, answer.json["key"]) == (200, key)
    assert words in answer.json["error"]
    assert "plan" not in answer.json


def test_what_is_no_form_is_refused(dashboard):
    wrong = (
        {"preset": "quickstart", "more": 1},
        {"gpus": "many"},
        {"text": "x" * 10**6},
        {"overrides": ["x"] * 101},
        [],
    )
    for form in wrong:
        assert dashboard.post("/api/plan", form).status in (400, 413)
        assert dashboard.post("/api/plan/topologies", form).status in (400, 413)


@pytest.fixture
def named(tmp_path):
    """Files that a config may name, and the sign that the code in one of them ran."""
    (tmp_path / "plugin.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    (tmp_path / "below.yaml").write_text("run: {name: a-secret}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "a-secret"}')
    return tmp_path


TEXTS = {
    "plugins: ['{}/plugin.py']": "plugins are not loaded here",
    "base: '{}/below.yaml'": "files are not read here",
    "model: {{from: '{}/model'}}": "folders are not read here",
    "model: {{rope_scaling: {{kind: yarn, factor: 2}}}}\ntrain: {{init_from: '{}/model'}}": "folders are not read here",
}


@pytest.mark.parametrize(("text", "words"), TEXTS.items(), ids=range(len(TEXTS)))
def test_nothing_that_a_config_names_is_run_or_read(dashboard, named, monkeypatch, text, words):
    opened, real = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda path, *a, **k: (opened.append(str(path)), real(path, *a, **k))[1])
    answer = dashboard.post("/api/plan", {"text": text.format(named)}).json
    assert words in answer["error"]
    assert "a-secret" not in json.dumps(answer)
    assert not [path for path in opened if path.startswith(str(named))]
    assert not (named / "ran").exists()


def test_overrides_name_nothing_either(dashboard, named):
    for key in (f"plugins=['{named}/plugin.py']", f"model.from={named}/model"):
        answer = dashboard.post("/api/plan", {"preset": "quickstart", "overrides": [key]}).json
        assert "not loaded here" in answer["error"] or "not read here" in answer["error"]
    assert not (named / "ran").exists()


def test_no_data_are_read(dashboard, named):
    (named / "data").mkdir()
    (named / "data" / "manifest.json").write_text("a-secret")
    for keys in (["data.path=" + str(named / "data")], [f"data.prepare.tokenizer={named}/model"]):
        told = dashboard.post("/api/plan", {"preset": "quickstart", "gpu": "cpu", "overrides": keys}).json
        assert "a-secret" not in json.dumps(told)
        assert ("model.vocab_size" in told["error"]) if "tokenizer" in keys[0] else told["plan"]


def test_a_preset_is_the_same_apart():
    for name in ("quickstart", "moe-8x7b"):
        keys = ["train.steps=20", "parallel.dp=2"]
        apart, own = load_apart(f"base: {name}", keys), load(name, keys)
        assert (apart, apart.defaults) == (own, own.defaults)
    with pytest.raises(ConfigError, match="over 524,288 bytes"):
        load_apart("x" * 600_000)
