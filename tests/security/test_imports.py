"""Files in the working directory are imported by nothing that we start, unless the config has `plugins:`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny

from configs import to_yaml
from trainer.observe.plots.run import plot_run
from trainer.record.lines import Record, read_events

ROOT = Path(__file__).parents[2]
WORDS = """
import os
with open({ran!r}, "a") as file:
    file.write(__name__ + "\\n")
raise ImportError("the one in the working directory")
"""
OURS = ("configs", "models", "cluster")
INSTALLED = ("numpy", "torch", "deepspeed", "mlflow", "ray", "pyarrow", "pydantic", "rich", "typer", "yaml", "psutil")
ABSENT = (
    # Each is looked for by torch, DeepSpeed, MLflow, pyarrow or site, and is not installed with them here.
    "triton", "op_builder", "sitecustomize", "usercustomize", "torch_xla", "habana_frameworks", "torch_npu",
    "intel_extension_for_pytorch", "mpi4py", "pynvml", "apex", "cupy", "flash_attn", "tensorflow", "jax", "boto3",
    "opt_einsum", "numba", "dill", "IPython", "tensorboard", "comet_ml", "wandb", "azure", "google", "mlflow_oidc",
)  # fmt: skip


@pytest.fixture
def hostile(tmp_path):
    """A folder with a module of every such name; what of it was imported is in `ran`."""
    folder = tmp_path / "user"
    folder.mkdir()
    for number, name in enumerate((*OURS, *INSTALLED, *ABSENT)):
        package = folder / name
        package = package / "__init__.py" if number % 2 else package.with_suffix(".py")
        package.parent.mkdir(exist_ok=True)
        package.write_text(WORDS.format(ran=str(tmp_path / "ran")))
    # As an installed plugin of MLflow's is found.
    (folder / "evil-1.0.dist-info").mkdir()
    (folder / "evil-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (folder / "evil-1.0.dist-info" / "entry_points.txt").write_text(
        "[mlflow.tracking_store]\nsqlite = evil\n[mlflow.artifact_repository]\nfile = evil\n"
        "[mlflow.run_context_provider]\nevil = evil\n"
    )
    (folder / "evil.py").write_text(WORDS.format(ran=str(tmp_path / "ran")))
    return folder


def imported(folder: Path) -> list[str]:
    ran = folder.with_name("ran")
    return ran.read_text().split() if ran.exists() else []


def run(folder: Path, command: list[str], path: str = f"{ROOT}:", **more: str) -> subprocess.CompletedProcess[str]:
    """In the folder, with an empty part in PYTHONPATH, which means it, before all that is installed."""
    of_a_group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_")) and k not in of_a_group}
    environment = kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def config(folder: Path, data: Path) -> str:
    asked = tiny(
        run={"name": "run", "root": "runs"},
        data={"path": str(data)},
        train={"steps": 2, "sample_tokens": 0, "eval_every": 0},
        tracking={"enabled": True, "export_model": False},
    )
    (folder / "config.yaml").write_text(to_yaml(asked))
    return "config.yaml"


def test_the_modules_would_be_imported(hostile):
    """From the working directory of a Python that does not leave it out."""
    run(hostile, ["-c", "import mpi4py"])
    assert imported(hostile) == ["sitecustomize", "mpi4py"]


# A `sitecustomize` on PYTHONPATH is imported before any code of ours: what we leave out is not passed on to children.
BY_US_ALONE = [[], ["sitecustomize"]]


@pytest.mark.slow
def test_python_m_trainer_and_its_children(hostile, tiny_data):
    """As torchrun starts it, with the process that sends the record to MLflow."""
    done = run(hostile, ["-m", "trainer", config(hostile, tiny_data)])
    assert done.returncode == 0, done.stderr
    assert (hostile / "runs" / "mlflow.db").exists()
    assert imported(hostile) in BY_US_ALONE


@pytest.mark.slow
@pytest.mark.ray
def test_muster_train_through_ray(hostile, tiny_data):
    done = run(hostile, ["-P", "-m", "cluster.cli", "train", config(hostile, tiny_data)])
    assert done.returncode == 0, done.stderr
    assert (hostile / "runs" / "mlflow.db").exists()
    assert imported(hostile) in BY_US_ALONE


@pytest.mark.slow
def test_tokenizers_in_processes_of_their_own(hostile):
    for number in range(4):
        (hostile / f"{number}.txt").write_text(f"some words {number}\n" * 5000)
    files = [f"{number}.txt" for number in range(4)]
    command = ["-P", "-m", "cluster.cli", "data", "prepare", *files, "--out", "data", "--workers", "2"]
    done = run(hostile, command)
    assert done.returncode == 0, done.stderr
    assert imported(hostile) in BY_US_ALONE


@pytest.mark.few(1)
@pytest.mark.parametrize("command", [["config", "quickstart"], ["plan", "quickstart"], ["doctor"], ["runs"]])
def test_commands(hostile, command):
    run(hostile, ["-P", "-m", "cluster.cli", *command])
    assert imported(hostile) in BY_US_ALONE


def test_with_plugins_it_is_the_last_place_to_look(hostile):
    (hostile / "beside.py").write_text("")
    (hostile / "mine.py").write_text("import sys, os, beside, numpy, models; print(sys.path[-1] == os.getcwd())")
    code = (
        "from trainer.run.plugins import load_plugins; load_plugins([]); import sys, os; print(os.getcwd() in sys.path)"
    )
    done = run(hostile, ["-c", f"import sys; del sys.path[0]; {code}; load_plugins(['mine'])"], str(ROOT))
    assert done.stdout == "False\nTrue\n", done.stderr
    assert imported(hostile) == []


PATHS = [
    ("import configs", f":{ROOT}", False),
    ("import configs", f"{ROOT}:", False),
    ("import configs", "{here}:" + str(ROOT), True),  # the user's own word
    ("import configs", "{here}::" + str(ROOT), True),
    ("import configs", f".:{ROOT}", True),
    ("import sys; sys.path.append('" + str(ROOT) + "'); import configs", ":", False),
    ("import trainer", f":{ROOT}", False),
    ("import cluster", f":{ROOT}", False),
]


@pytest.mark.few(3)
@pytest.mark.parametrize(("code", "path", "searched"), PATHS, ids=[f"{c} {p}" for c, p, _ in PATHS])
def test_what_python_path_means(tmp_path, code, path, searched):
    told = "; import os, sys; print(os.getcwd() in sys.path, os.environ['PYTHONPATH'])"
    done = run(tmp_path, ["-P", "-c", code + told], path.format(here=tmp_path))
    there, left = done.stdout.removesuffix("\n").split(" ")
    assert there == str(searched), done.stderr
    assert not left or "" not in left.split(":")


def test_our_own_folder_stays_where_it_is_the_working_directory():
    done = run(ROOT, ["-P", "-c", "import configs, sys, trainer, models; print(configs.__path__[0])"], ":/nowhere")
    assert done.stdout == f"{ROOT / 'configs'}\n", done.stderr


@pytest.mark.slow
def test_a_matplotlibrc_runs_nothing(tmp_path):
    """It may ask for LaTeX, which reads files and runs programs by what a name on the picture says."""
    run_dir, programs = tmp_path / "run", tmp_path / "programs"
    programs.mkdir()
    for name in ("latex", "pdflatex", "dvipng", "kpsewhich"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path / 'ran'}\nexit 1\n")
        (programs / name).chmod(0o755)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: module://evil\n")
    record = Record(run_dir, 1)
    for step in range(1, 4):
        record.metrics({"step": step, "loss": 1 / step, "lr": 1.0, "grad_norm": 1.0, "step_time": 1.0, "tokens": step})
    record.close()
    code = "import sys; from trainer.observe.plots.run import plot_run; print(len(plot_run(sys.argv[1])))"
    path = f"{programs}:{os.environ['PATH']}"
    done = run(tmp_path, ["-P", "-c", code, str(run_dir)], str(ROOT), PATH=path)
    assert done.stdout == f"{len(plot_run(run_dir))}\n", done.stderr
    assert not (tmp_path / "ran").exists()
    assert read_events(run_dir) == []
