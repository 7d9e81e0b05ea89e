"""The house rules that code can break without a test of its own failing: who imports whom, sizes, what is declared."""

import ast
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from typer.main import get_command

from cluster.cli import app
from configs import load, preset_names
from models.families import FAMILIES
from models.tasks.table import TASKS

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "models", "trainer", "cluster")
"""Each imports only what stands before it."""
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 500


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, inside functions too, by its whole name."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree(path)):
        yield from imported(node, package)


def imported(node: ast.AST, package: tuple[str, ...] = ()) -> Iterator[str]:
    """What one statement imports, in a file of a package."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else ()
        yield ".".join((*above, *filter(None, [node.module])))


def top_level(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imports(path)}


def test_the_packages_are_found():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    later = set(PACKAGES[PACKAGES.index(package) + 1 :])
    wrong = {name(path): top_level(path) & later for path in FILES if name(path).startswith(f"{package}/")}
    assert {path: found for path, found in wrong.items() if found} == {}


def test_deepspeed_stands_in_one_folder():
    users = {name(path.parent) for path in FILES if "deepspeed" in top_level(path)}
    assert users == {"trainer/engine"}


def test_ray_stands_in_cluster():
    users = [name(path) for path in FILES if "ray" in top_level(path)]
    assert users
    assert [path for path in users if not path.startswith("cluster/")] == []


KNOW_NO_FAMILY = ("loop", "step", "state", "trainee", "bookkeeping", "schedule", "late")
ROOMS_OF_NONE = ("engine", "checkpoint", "record", "tracking", "health")
CUT = {"trainer/engine/pipeline.py", "trainer/engine/ulysses.py"}
"""How a decoder is cut: its layers into stages, its attention by heads."""
WEIGHTS_FROM_ELSEWHERE = {"trainer/checkpoint/export.py", "trainer/checkpoint/init_from.py"}
"""Hugging Face folders, out and in, and experts made of a dense decoder's MLPs."""
SHARED_TASKS = {"models.tasks." + each for each in ("task", "learner", "table", "samples")}


def knows_of_a_family(path: Path) -> set[str]:
    """What a file imports of one family or task, and the entries of the two tables that it names."""
    found = {module for module in imports(path) if module.startswith(("models.decoder", "models.hf", "models.tasks."))}
    texts = {node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant)}
    return (found - SHARED_TASKS) | (texts & {*FAMILIES, *TASKS})


def test_the_trainer_knows_no_family_or_task():
    files = [path for path in FILES if name(path).startswith(tuple(f"trainer/{room}/" for room in ROOMS_OF_NONE))]
    files += [ROOT / "trainer" / f"{each}.py" for each in KNOW_NO_FAMILY] + [ROOT / "trainer/observe/evaluation.py"]
    assert {name(path) for path in files if knows_of_a_family(path)} == CUT | WEIGHTS_FROM_ELSEWHERE


@pytest.mark.parametrize(
    "line",
    [
        "from models.tasks.language_modelling import LanguageModelling",
        "from models.decoder import model",
        "fine = config.model.family == 'decoder'",
        "fine = config.task in ('language_modelling', 'other')",
    ],
)
def test_that_is_seen(tmp_path, monkeypatch, line):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "loop.py").write_text(line)
    assert knows_of_a_family(tmp_path / "loop.py")


@pytest.mark.parametrize("folder", ["configs", "models/planning", "models/scaling"])
def test_no_torch_in_what_runs_on_a_laptop(folder):
    files = [path for path in FILES if path.is_relative_to(ROOT / folder)]
    assert files
    assert [name(path) for path in files if {"torch", "deepspeed"} & top_level(path)] == []


DEEPSPEED_PRIVATE, RAY_PRIVATE = "trainer/engine/private.py", "cluster/gangs/ray_private.py"
"""The one file each for names that DeepSpeed and Ray do not document."""
DEEPSPEED_PUBLIC = {"__call__", "backward", "step", "train", "eval", "train_batch", "module", "device", "optimizer"}
DEEPSPEED_PUBLIC |= {"get_global_grad_norm", "was_step_applied", "destroy"}
"""What its documentation, or a docstring of its own, says of its engine and of a pipeline's."""
DEEPSPEED_STATES = re.compile(
    r"ds_\w+|_hp_mapping|[lh]p_fragment_address|param_group_index|(fp32|fp16|bf16|bit16)_\w*(flat|groups)\w*|\w+_of_fp32_groups"
    r"|grad_position|get_param_id|params_in_partition|averaged_gradients|scaled_global_norm|invalidate_secondary_tensor"
    r"|loss_scaler|_global_grad_norm|_zero_padding|first_dataloader_check|enable_backward_allreduce|autotp_size"
    r"|fp16_enabled|zero_optimization_stage|gradient_accumulation_steps|group_name|_get_expert_parallel_rank"
)
"""Attributes of its engines, optimizers and parameters by which it keeps its states."""
RAY_UNDOCUMENTED = ("ray.dashboard", "ray.experimental")
"""Beside what begins with an underscore."""


def attributes(path: Path) -> set[str]:
    """Every attribute a file looks up, and every name that it asks `getattr` or `hasattr` for."""
    found = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) in ("getattr", "hasattr", "setattr"):
            found |= {arg.value for arg in call.args[1:2] if isinstance(arg, ast.Constant)}
    return found


def test_what_deepspeed_does_not_document_stands_in_one_file():
    users = {name(path) for path in FILES if "deepspeed" in top_level(path)}
    states = {name(path) for path in FILES if any(map(DEEPSPEED_STATES.fullmatch, attributes(path)))}
    assert users == states == {DEEPSPEED_PRIVATE}
    engines = {name(path) for path in FILES if "deepspeed" in attributes(path)}
    assert all(path.startswith("trainer/engine/") for path in engines)
    asked = {
        node.attr
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "deepspeed"
    }
    assert asked <= DEEPSPEED_PUBLIC
    assert "step" in asked


def private_of_ray(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(tree(path)):
        names = set(imported(node)) | ({ast.unparse(node)} if isinstance(node, ast.Attribute) else set())
        if isinstance(node, ast.ImportFrom):
            names = {f"{module}.{alias.name}" for module in names for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init":
            names = {f"ray.init.{word.arg}" for word in node.keywords}
        found |= {each for each in names if re.match(r"ray\.(.*\.)?_", each) or each.startswith(RAY_UNDOCUMENTED)}
    return found


def test_what_ray_does_not_document_stands_in_one_file():
    assert {name(path): private_of_ray(path) for path in FILES if private_of_ray(path)}.keys() == {RAY_PRIVATE}


@pytest.mark.parametrize(("library", "file"), [("deepspeed", DEEPSPEED_PRIVATE), ("ray", RAY_PRIVATE)])
def test_private_names_are_pinned_below_the_next_minor_version(library, file):
    (requirement,) = [each for each in PROJECT["dependencies"] if plain(each) == library]
    major, minor = re.search(r">=(\d+)\.(\d+)", requirement).groups()  # type: ignore[union-attr]
    assert requirement.endswith(f",<{major}.{int(minor) + 1}")
    assert f"{major}.{minor}" in ast.get_docstring(tree(ROOT / file))  # type: ignore[operator]


@pytest.mark.parametrize(
    "module", ["configs", "models.planning.plan", "models.planning.search", "models.scaling", "cluster.cli"]
)
def test_laptop_imports_nothing_heavy(module):
    heavy = "{'torch', 'ray', 'deepspeed', 'mlflow', 'transformers', 'matplotlib', 'pyarrow'}"
    code = f"import sys, {module}; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


RUNS_CODE = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
"""What would run code that stands in a file; `trainer.run.plugins` alone does, for what the user names in `plugins`."""


def test_nothing_that_runs_code_from_a_file():
    found = []
    for path in FILES:
        found += [f"{name(path)}: import {module}" for module in imports(path) if module.split(".")[0] in RUNS_CODE]
        calls = [ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        bad = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "yaml.unsafe_load"}
        found += [f"{name(path)}: {call}" for call in calls if call in bad]
        found += [f"{name(path)}: {call}" for call in calls if call.startswith("yaml.") and call.endswith("load")]
        found += [f"{name(path)}: {call}" for call in calls if call.endswith((".exec_module", "import_module"))]
    # One loader of YAML, a SafeLoader; a module of ours by its constant name; plugins.
    assert sorted(found) == [
        "configs/reading/parse.py: yaml.load",
        "configs/sections/model_from.py: importlib.import_module",
        "trainer/run/plugins.py: importlib.import_module",
        "trainer/run/plugins.py: spec.loader.exec_module",
    ]


UNPICKLES = re.compile(r"(all_gather|gather|scatter|broadcast|send|recv)_object(_list)?")
"""torch's collectives that unpickle what another process sent; `trainer.processes.collectives` sends JSON."""


def test_no_object_collective():
    found = []
    for path in [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py"))]:
        for node in ast.walk(tree(path)):
            named = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else [named]
            found += [f"{name(path)}: {each}" for each in names if UNPICKLES.fullmatch(each)]
    assert found == []


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_files_are_short():
    lines = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in (*FILES, *TESTS)}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


MAX_FILES = 12
"""Of a folder, beside `__init__` and `__main__`."""
FOLDERS = sorted({path.parent for path in FILES})


def test_folders_are_small():
    folders = {*FOLDERS, *(path.parent for path in TESTS)}
    count = {name(each): len([path for path in each.glob("*.py") if path.stem[:2] != "__"]) for each in folders}
    assert {folder: files for folder, files in count.items() if files > MAX_FILES} == {}


def test_every_folder_and_file_says_its_purpose():
    assert [name(path) for path in FILES if not ast.get_docstring(tree(path))] == []
    assert [name(each) for each in FOLDERS if not (each / "__init__.py").is_file()] == []


def test_no_name_of_the_standard_library():
    assert [name(path) for path in FILES if path.stem in sys.stdlib_module_names - {"__main__"}] == []
    assert [name(each) for each in FOLDERS if each.name in sys.stdlib_module_names] == []


ELSEWHERE = {"in_team", "train_in_process", "pair", "run_ranks", "submit"}
"""What runs the function that it is given in another process, which finds the modules of tests/helpers only."""


def test_what_other_processes_run_stands_in_the_helpers():
    found = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        local = {n.name for n in tree(path).body if isinstance(n, ast.FunctionDef) and not n.decorator_list}
        calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        away = [call for call in calls if ast.unparse(call.func).rpartition(".")[2] in ELSEWHERE]
        given = {name.id for call in away for name in call.args if isinstance(name, ast.Name)}
        found += [f"{name(path)}: {function}" for function in sorted(given & local)]
    assert found == []


# What is declared.

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEVER_IMPORTED = {
    "mypy", "ruff", "types-psutil", "types-pyyaml",  # tools of `make check`
    "pytest-timeout",  # of all tests
    "pytest-xdist",  # of `make test`
}  # fmt: skip
BROUGHT_ALONG = {
    "click",  # Ray's and MLflow's command lines, which the manifests of deploy/ are held against
    "prometheus-client",  # Ray's, which reads what /metrics answers
    "werkzeug",  # part of MLflow's server, which a test runs with faults put in
}


def plain(requirement: str) -> str:
    """`ray[default,train]>=2.60` is `ray`."""
    return re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-")


DECLARED = {plain(requirement) for requirement in PROJECT["dependencies"]}
FOR_DEVELOPERS = {plain(requirement) for requirement in PROJECT["optional-dependencies"]["dev"]}
FOR_GPUS = {plain(requirement) for requirement in PROJECT["optional-dependencies"]["gpu"]}
"""Used where they are installed; no run needs them, but some have tests."""
FOR_FAMILIES = {plain(requirement) for requirement in PROJECT["optional-dependencies"]["families"]}
"""Some families need them; all are for developers too."""


def distributions(files: list[Path]) -> set[str]:
    """The distributions whose modules the files import; of several that share a module, the declared one."""
    known = {"liger_kernel": ["liger-kernel"]} | packages_distributions()  # also where it is not installed
    ours = {
        *PACKAGES,
        "benchmarks",
        *(path.stem for path in (*(ROOT / "tests/helpers").rglob("*.py"), *(ROOT / "benchmarks").iterdir())),
    }
    modules = {module for path in files for module in top_level(path)} - set(sys.stdlib_module_names) - ours
    candidates = [[plain(each) for each in known.get(module, [module])] for module in modules]
    return {next((each for each in names if each in DECLARED | FOR_DEVELOPERS), names[0]) for names in candidates}


def test_every_import_is_declared_and_every_dependency_imported():
    assert distributions(FILES) - FOR_GPUS == DECLARED | FOR_FAMILIES


def test_tests_and_benchmarks_import_what_is_declared():
    files = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert distributions(files) - DECLARED - FOR_DEVELOPERS - FOR_GPUS - BROUGHT_ALONG == set()
    assert (FOR_DEVELOPERS | FOR_GPUS) - NEVER_IMPORTED - distributions(files) == set()


def test_a_family_waits_for_what_it_needs():
    """It is imported when such a network is built, not as a module loads."""
    assert FOR_FAMILIES <= FOR_DEVELOPERS - DECLARED
    asked = "import sys, models.families, models.tasks.table, trainer.data.kinds; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert FOR_FAMILIES.isdisjoint(plain(module) for module in told.split())


def test_nothing_needs_what_is_for_gpus():
    """It is imported by nobody as a module loads, and installed by no dependency, Makefile, image or deployment."""
    assert FOR_GPUS.isdisjoint(DECLARED)
    at_once = [module for path in FILES for node in tree(path).body for module in imported(node)]
    assert FOR_GPUS.isdisjoint(plain(module.partition(".")[0]) for module in at_once)
    installing = [ROOT / "Makefile", *(path for path in (ROOT / "deploy").rglob("*") if path.is_file())]
    installing.remove(ROOT / "deploy/constraints.txt")  # which pins what is asked for, and asks for nothing
    asks = re.compile(r"\[[\w, -]*\bgpu\b[\w, -]*\]|" + "|".join(FOR_GPUS))
    assert [name(path) for path in installing if asks.search(path.read_text(errors="replace"))] == []


def test_every_dependency_is_pinned_within_its_bounds():
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {plain(key): version for key, version in pins.items()}
    assert sorted((DECLARED | FOR_DEVELOPERS) - pins.keys()) == []

    def number(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    for requirement in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        pinned = number(pins[plain(requirement)])
        for relation, bound in re.findall(r"(>=|<)([\d.]+)", requirement):
            assert (pinned >= number(bound)) == (relation == ">="), requirement


# What the READMEs say.

READMES = {path: path.read_text(encoding="utf-8") for path in (ROOT / each / "README.md" for each in ("", *PACKAGES))}


def blocks(language: str) -> list[str]:
    fenced = re.compile(rf"^```{language}\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    return [block for text in READMES.values() for block in fenced.findall(text)]


COMMANDS = [
    line
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not re.match(r"\s*(#|umask 077\b|export [A-Z_]+=)", line)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_readme_command(line):
    """`muster ...` has the sub-command, the options and the keys; `make ...` the target; nothing else is shown but how
    MLflow's server is started, and what the shell is told before a command."""
    words = shlex.split(line, comments=True)
    program, *arguments = itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)
    if program == ".venv/bin/mlflow":
        from mlflow.cli import server  # a second

        assert arguments.pop(0) == "server"
        server.make_context("server", arguments)
        return
    if program in ("umask", "export"):
        return
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(arguments) <= set(targets)
        return
    assert program == "muster"
    command = get_command(app)
    while hasattr(command, "commands") and (arguments or not command.invoke_without_command):
        assert arguments[0] in command.commands
        command = command.commands[arguments.pop(0)]
    given = command.make_context(command.name, list(arguments)).params
    if "config" in given and "overrides" in given:
        assert given["config"] in preset_names()
        load(given["config"], given["overrides"] or ())


def test_readme_shows_commands():
    assert {shlex.split(line, comments=True)[0] for line in COMMANDS} >= {"make", "muster"}


@pytest.mark.parametrize("text", blocks("yaml"))
def test_readme_config_loads(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    load(tmp_path / "c.yaml")


def test_readmes_link_to_what_is_there():
    for path, text in READMES.items():
        links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
        assert [link for link in links if not (path.parent / link).exists()] == [], path


def test_the_readme_is_short():
    assert len(READMES[ROOT / "README.md"].split()) <= 1200
    assert [line for text in READMES.values() for line in text.splitlines() if len(line) > 125 and line[0] != "|"] == []
