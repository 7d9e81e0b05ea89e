"""A user's own modules: they add to the tables, their mistakes are messages, and they never shadow ours."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import resolved

from configs import ConfigError, from_dict, resolve
from configs.sections.pairs import check_pair
from models.families import FAMILIES, build
from trainer.run.plugins import load_plugins, with_plugins

FAMILY = """
from models.decoder.model import Decoder
from models.families import FAMILIES, Family

class Mine(Decoder):
    pass

FAMILIES["mine"] = Family(build=Mine)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    modules = set(sys.modules)
    yield lambda text, name="plugin.py": _write(tmp_path / name, text)
    for module in set(sys.modules) - modules:
        del sys.modules[module]
    FAMILIES.pop("mine", None)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_adds_a_family(plugin):
    with pytest.raises(ConfigError, match=r"model\.family=mine: no such family; known: .*decoder"):
        build(resolved(model={"family": "mine"}).model)
    load_plugins([str(plugin(FAMILY))])
    assert type(build(resolved(model={"family": "mine"}).model)).__name__ == "Mine"


def test_a_family_that_no_plugin_defines_is_named(plugin):
    asked = from_dict({"model": {"family": "other"}, "plugins": [str(plugin(FAMILY))]})
    config, _ = resolve(with_plugins(asked))
    with pytest.raises(ConfigError, match=r"^model\.family=other: no such family; known: .*decoder, .*mine"):
        check_pair(config)


def test_a_module_adds_a_family(plugin, tmp_path):
    plugin("", "pack/__init__.py")
    plugin(FAMILY, "pack/inner.py")
    sys.path.append(str(tmp_path))
    load_plugins(["pack.inner"])
    assert type(build(resolved(model={"family": "mine"}).model)).__name__ == "Mine"


def test_a_file_is_run_once(plugin, tmp_path):
    path = plugin(f"open({str(tmp_path / 'ran')!r}, 'a').write('x')")
    load_plugins([str(path), str(path)])
    load_plugins([str(path)])
    assert (tmp_path / "ran").read_text() == "x"


def test_two_files_of_one_name_are_both_run(plugin, tmp_path):
    paths = [plugin(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name}')", f"{name}/model.py") for name in "ab"]
    load_plugins(map(str, paths))
    assert (tmp_path / "ran").read_text() == "ab"


BAD = {
    "missing": (None, r"FileNotFoundError: .*plugin\.py"),
    "not Python": ("import (", r"SyntaxError: .*\(plugin\.py, line 1\)"),
    "imports what is not there": ("\nimport no_such_package_xyz", r"ModuleNotFoundError: .*plugin\.py, line 2\)"),
    "own mistake": ("\n\ndef f():\n    return missing\nf()", r"NameError: name 'missing' .*plugin\.py, line 4\)"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_a_mistake_every_time(plugin, tmp_path, text, message):
    path = tmp_path / "plugin.py"
    if text is not None:
        plugin(text)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"^plugins: .*plugin\.py: {message}") as caught:
            load_plugins([str(path)])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_package_xyz", "json.nothing", ""])
def test_a_missing_module(name):
    with pytest.raises(ConfigError, match=f"^plugins: {name}: "):
        load_plugins([name])


def test_files_named_like_ours_do_not_shadow_them(plugin, tmp_path):
    """As a worker does it: ours are imported first, the user's folder stands at the end of the path."""
    for name in ("models", "configs", "trainer"):
        plugin("raise RuntimeError('the wrong one')", f"{name}/__init__.py")
    plugin("import configs, models, trainer.run.plugins; print('mine', models.__path__[0])", "models.py")
    code = (
        "import sys, configs, models, trainer; sys.path.append('.')\n"
        "from trainer.run.plugins import load_plugins\n"
        "load_plugins(['models.py', 'models', 'models.families', 'configs'])\n"
        "import models, models.planning.cost; print(models.__path__[0])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    ours = str(Path(build.__code__.co_filename).parent)
    assert done.stdout == f"mine {ours}\n{ours}\n"
