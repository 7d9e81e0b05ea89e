"""`torchrun -m trainer CONFIG`: without Ray, from a folder whose own packages are named like ours."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ranks import free_port, run_ranks
from support import tiny

from configs import preset_names, to_yaml
from trainer.checkpoint import manifest, store
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_events, read_metrics

PLUGIN = """
import os, sys
import configs, models
from pathlib import Path
rank = os.environ["RANK"]
print(f"plugin of rank {rank}")
Path(f"seen-{rank}").write_text(f"{configs.__path__[0]}\\n{models.__path__[0]}")
"""


def surroundings() -> dict[str, str]:
    """The environment, without the variables that an earlier test has set for its process group."""
    of_a_group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in of_a_group} | {"OMP_NUM_THREADS": "1"}


def torchrun(folder: Path, *arguments: str, processes: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(free_port()), "-m", "trainer", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def write_config(folder: Path, data: Path, name: str, steps: int, **sections) -> str:
    config = tiny(
        run={"name": name, "root": "runs"},
        data={"path": str(data)},
        train={"steps": steps, "sample_tokens": 4, "eval_every": steps},
        parallel={"dp": 2, "zero_stage": 2},
        **sections,
    )
    (folder / f"{name}.yaml").write_text(to_yaml(config))
    return f"{name}.yaml"


@pytest.mark.slow
def test_two_processes_from_a_hostile_folder(tmp_path, tiny_data):
    for package in ("configs", "models"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise RuntimeError('the wrong {package}')")
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    config = write_config(tmp_path, tiny_data, "two", 4)
    process = torchrun(tmp_path, config, "checkpoint.every=2", "plugins=[my_plugin]")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    run_dir = tmp_path / "runs" / "two"
    assert [line for line in err.splitlines() if line.startswith(str(run_dir))] == [f"{run_dir}: FINISHED"]
    assert "Traceback" not in err
    assert "step 4/4" in out
    logs = sorted((run_dir / "logs").iterdir())
    assert [path.name for path in logs] == ["attempt-01-rank-0000.log", "attempt-01-rank-0001.log"]
    assert "plugin of rank 1\n" in logs[1].read_text()
    assert "plugin of rank 1" not in out

    assert (tmp_path / "seen-0").read_text() == (tmp_path / "seen-1").read_text()
    assert str(tmp_path) not in (tmp_path / "seen-0").read_text()
    assert [m["step"] for m in read_metrics(run_dir) if "loss" in m] == [1, 2, 3, 4]
    assert [m["step"] for m in read_metrics(run_dir) if "eval_loss" in m] == [4]
    events = read_events(run_dir)
    started = [event for event in events if event["event"] == "attempt_started"]
    assert [event["world_size"] for event in started] == [2]
    assert (events[-1]["event"], events[-1]["status"], events[-1]["step"]) == ("attempt_ended", "FINISHED", 4)
    assert manifest.committed(run_dir) == [2, 4]
    for step in (2, 4):
        assert store.verify(manifest.folder(run_dir, step)) == []
    shards = [path.name for path in manifest.folder(run_dir, 4).glob("*.safetensors")]
    assert sorted(shards) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert [path.name for path in (run_dir / "samples").glob("*.txt")] == ["step-00000004.txt"]


MISTAKES = {
    "unknown key": (
        ["quickstart", "optim.nme=x"],
        "muster: quickstart: unknown key optim.nme: did you mean optim.name?",
    ),
    "no config": ([], "muster: usage: torchrun -m trainer CONFIG [key=value ...]"),
    "no such preset": (
        ["quikstart"],
        f"muster: no config 'quikstart': neither a file nor a preset ({', '.join(preset_names())}); did you mean "
        "quickstart?",
    ),
    "found by rank 0": (
        ["quickstart", "optim.warmup=301", "train.steps=300", "parallel.dp=2"],
        "muster: optim.warmup (301) is longer than train.steps (300): set optim.warmup=30, or train.steps=3010",
    ),
    "other number of processes": (
        ["config.yaml", "parallel.dp=1"],
        "muster: 2 processes were started but parallel.dp * tp * pp * "
        "sp is 1: start as many, change the degrees, or allow it with cluster.workers=[min, max]",
    ),
}


@pytest.mark.parametrize(("arguments", "line"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, tiny_data, arguments, line):
    (tmp_path / write_config(tmp_path, tiny_data, "run", 4)).rename(tmp_path / "config.yaml")
    assert run_ranks(tmp_path, arguments) == [(2, f"{line}\n"), (2, "")]
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_attempt_and_the_next_one_goes_on_exactly(tmp_path, tiny_data):
    steps = 60

    def start(name):
        config = write_config(
            tmp_path, tiny_data, name, steps, checkpoint={"every": 5}, model={"dropout": 0.1}, cluster={"timeout": 60}
        )
        return tmp_path / "runs" / name, torchrun(tmp_path, config)

    clean, process = start("clean")
    assert process.wait(300) == 0
    run_dir, process = start("killed")
    while not any(m["step"] >= 23 for m in (read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else [])):
        assert process.poll() is None
        time.sleep(0.05)
    [victim] = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    victim.send_signal(signal.SIGKILL)
    assert process.wait(120) == 1
    assert manifest.committed(run_dir)[-1] >= 20
    last = read_metrics(run_dir)[-1]["step"]
    assert last < steps, "killed too late to prove anything"

    run_dir, process = start("killed")
    assert process.wait(300) == 0
    resumed = [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"]
    assert 0 < resumed[-1] <= last
    assert losses(run_dir) == losses(clean)
    assert final_state(run_dir, steps) == final_state(clean, steps)


def losses(run_dir: Path) -> list[tuple]:
    return [(m["step"], m.get("loss"), m.get("eval_loss"), m.get("grad_norm")) for m in read_metrics(run_dir)]


def final_state(run_dir: Path, step: int) -> dict[tuple[str, str], bytes]:
    reader = Reader(manifest.folder(run_dir, step))
    return {(k, n): reader.read(k, n).numpy().tobytes() for k in reader.states for n in reader.manifest.shapes[k]}
