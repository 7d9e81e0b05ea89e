"""The batch script of deploy/slurm: checked, and run with stand-ins for Slurm and muster."""

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from stand_ins import write_stand_ins
from typer.main import get_command

from cluster.cli import app
from configs import load

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "muster.sbatch"
TEXT = SCRIPT.read_text()
JOB = 4321


def test_bash_reads_it():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_its_example_is_a_run():
    (example,) = re.findall(r"^#   sbatch (.*?)\n#\n", TEXT, flags=re.MULTILINE | re.DOTALL)
    words = shlex.split(example.replace("\\\n#", " "))
    config, *overrides = words[words.index("deploy/slurm/muster.sbatch") + 1 :]
    nodes, gpus = (int(word.partition("=")[2]) for word in words[:2])
    assert load(config, overrides).parallel.world_size == nodes * gpus


def test_slurm_is_told_to_signal_the_script_alone_and_to_queue_it_again():
    options = re.findall(r"^#SBATCH (\S+)$", TEXT, flags=re.MULTILINE)
    assert {"--requeue", "--exclusive", "--open-mode=append"} <= set(options)
    (lead,) = [int(option.rpartition("@")[2]) for option in options if option.startswith("--signal=B:TERM@")]
    assert lead > 60


def heed() -> None:
    """A background job's children are born deaf to SIGINT, which bash then cannot trap."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Dry:
    """A dry run that has ended."""

    code: int
    printed: str
    calls: list[dict]
    state: Path

    def of(self, program: str) -> list[list[str]]:
        return [call[program] for call in self.calls if program in call]


def dry_run(folder: Path, code: int = 0, send: int | None = None, lost: bool = False) -> Dry:
    programs = folder / "bin"
    programs.mkdir()
    log = write_stand_ins(programs, code, 0.2 if send is None else 60, lost)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(folder), "SLURM_JOB_ID": str(JOB + os.getpid() % 1000),
        "SLURM_JOB_NODELIST": "n[1-2]", "RAY_AUTH_TOKEN": "of another cluster",
    }  # fmt: skip
    command = ["bash", SCRIPT, "quickstart", "run.root=/shared runs"]
    output = folder / "output"
    with output.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=file, stderr=file, preexec_fn=heed)
        try:
            if send is not None:
                end = time.monotonic() + 60
                while "training" not in output.read_text().splitlines():
                    assert process.poll() is None, output.read_text()
                    assert time.monotonic() < end
                    time.sleep(0.05)
                process.send_signal(send)
            ended = process.wait(60)
        finally:
            process.kill()
    calls = [ast.literal_eval(line) for line in log.read_text().splitlines()]
    return Dry(ended, output.read_text(), calls, folder / ".muster" / "slurm")


@pytest.mark.parametrize("code", [0, 2])
def test_it_ends_as_the_run_ends(tmp_path, code):
    dry = dry_run(tmp_path, code)
    assert dry.code == code, dry.printed
    up, join, train = dry.of("muster")
    port = 20000 + (JOB + os.getpid() % 1000) % 10000
    assert up[:3] == ["cluster", "up", "--node-ip-address=127.0.0.1"]
    assert join[:3] == ["cluster", "join", f"127.0.0.1:{port}"]
    assert train == ["train", "quickstart", "run.root=/shared runs"]
    assert f"--port={port}" in up
    assert f"--server-port={port + 10000}" in up
    for arguments in (up, join):
        group = get_command(app).commands["cluster"]
        given = group.commands[arguments[1]].make_context(arguments[1], arguments[2:])
        assert set(given.args) >= {"--num-cpus=2", "--log-color=false"}
    assert [options[2] for options in dry.of("srun")] == ["--nodelist=n1", "--nodelist=n2"]
    assert {call["RAY_AUTH_MODE"] for call in dry.calls if "muster" in call} == {"token"}
    assert [call["GLOO_SOCKET_IFNAME"] for call in dry.calls if "muster" in call][:2] == ["lo", "lo"]
    assert [call["RAY_ADDRESS"] for call in dry.calls if "muster" in call] == [None, None, f"127.0.0.1:{port}"]
    assert dry.of("scontrol") == []
    assert list(dry.state.iterdir()) == []  # the token is gone


def test_before_the_limit_it_queues_itself_again_after_a_checkpoint(tmp_path):
    dry = dry_run(tmp_path, 75, signal.SIGTERM)
    assert "stopped with a checkpoint" in dry.printed
    assert dry.of("scontrol") == [["requeue", str(JOB + os.getpid() % 1000)]]
    assert list(dry.state.iterdir()) == []


def test_before_the_training_began_it_is_not_queued_again(tmp_path):
    dry = dry_run(tmp_path, 128 + signal.SIGTERM, signal.SIGTERM)
    assert "stopped before the training began: raise --time" in dry.printed
    assert dry.of("scontrol") == []
    assert dry.code == 75


def test_asked_to_end_it_ends_after_a_checkpoint(tmp_path):
    dry = dry_run(tmp_path, 75, signal.SIGINT)
    assert "stopped with a checkpoint" in dry.printed
    assert dry.of("scontrol") == []
    assert dry.code == 75


def test_a_node_that_does_not_join_ends_it(tmp_path):
    dry = dry_run(tmp_path, lost=True)
    assert dry.code == 1
    assert "not all of n1 n2 joined" in dry.printed
    assert [call for call in dry.of("muster") if call[0] == "train"] == []
    assert list(dry.state.iterdir()) == []


def test_without_a_config_it_says_what_it_wants(tmp_path):
    done = subprocess.run(["bash", SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "CONFIG" in done.stderr
