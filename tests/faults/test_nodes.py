"""Faults of a whole machine, on three real Ray nodes, each with an address of its own: jobs end as one left alone."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ledger import SAMPLE_TOKENS, plugin
from local_cluster import LocalCluster, Process, missing, ranks_of, steps_of, wait_for
from proofs import (
    attempts_from,
    check_each_sample_once_per_epoch,
    digest,
    losses,
    order_of_use,
    prepare_samples,
    rolled_back,
    samples_in,
    use_by_step,
)
from schedule import kills
from support import train_in_process

from configs import load
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=str(missing()))]

STEPS, EVERY = 300, 20
HEAD = 0
CONFIG = """
run: {{name: {name}, root: {root}}}
model: {{num_layers: 2, hidden_size: 32, num_heads: 2, num_experts: 4, expert_size: 32, vocab_size: 320, dropout: 0.1}}
train: {{steps: {steps}, global_batch: 8, seq_len: {length}, precision: fp32, eval_sequences: 4, sample_tokens: 0}}
data: {{path: {data}}}
parallel: {{dp: 2, zero_stage: 2}}
checkpoint: {{every: {every}}}
cluster: {{cpus_per_worker: 2, max_failures: 20}}  # a process fills a machine, and one machine is left over
tracking: {{enabled: false}}
plugins: [{plugin}]
"""


@dataclass
class World:
    """The cluster, and jobs of one config on it."""

    cluster: LocalCluster
    folder: Path
    data: Path

    def submit(self, name: str, *overrides: str) -> tuple[str, Path]:
        """(id of the job, folder of its run)."""
        name, run_dir = self.write(name)
        return self.cluster.submit(name, *overrides), run_dir

    def write(self, name: str) -> tuple[str, Path]:
        """(a config, folder of its run)."""
        run_dir = self.folder / "runs" / name
        ledger = plugin(self.folder / f"{name}_ledger.py", run_dir / "ledger")
        text = CONFIG.format(
            name=name,
            root=run_dir.parent,
            steps=STEPS,
            length=SAMPLE_TOKENS,
            data=self.data,
            every=EVERY,
            plugin=ledger,
        )
        (self.cluster.user / f"{name}.yaml").write_text(text)
        return f"{name}.yaml", run_dir

    def apart_from_head(self, run_dir: Path) -> Process:
        """A process of the run's newest attempt that is not on the head."""
        attempt, _ = steps_of(run_dir)
        return next(each for each in ranks_of(run_dir, attempt).values() if each.node != HEAD)

    def mend(self, number: int) -> None:
        """As its owner would: what is left of a node that had an accident is ended, and the node started again."""
        self.cluster.do("kill", str(number))
        self.cluster.do("start", str(number))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "user").mkdir()
    data = prepare_samples(folder, 128)
    with LocalCluster(3, folder / "user") as cluster:
        if cluster.url.startswith("http://127."):
            pytest.skip("the nodes share the loopback")
        yield World(cluster, folder, data)


@pytest.fixture(scope="module")
def clean(world) -> Path:
    id, run_dir = world.submit("clean")
    world.cluster.finish(id, run_dir)
    return run_dir


def reached(run_dir: Path, step: int, attempt: int = 1) -> Callable[[], bool]:
    """Whether an attempt, or a later one, has recorded a step."""
    return lambda: steps_of(run_dir) >= (attempt, step)


def check(run_dir: Path, clean: Path, world: World) -> None:
    """The proof: the same weights, the same record, each sample once per epoch, at most one checkpoint taken back."""
    assert digest(run_dir, STEPS) == digest(clean, STEPS) != digest(clean, STEPS - EVERY)
    assert losses(run_dir) == losses(clean)
    used = order_of_use(run_dir, 2)
    assert used == order_of_use(clean, 2)
    check_each_sample_once_per_epoch(used, samples_in(world.data))
    assert max(rolled_back(run_dir), default=0) <= 1


def test_a_killed_worker(world, clean):
    id, run_dir = world.submit("worker")
    wait_for(reached(run_dir, 50))
    os.kill(world.apart_from_head(run_dir).pid, signal.SIGKILL)
    world.cluster.finish(id, run_dir)
    assert sorted(attempts_from(run_dir)) == [1, 2]
    assert [event["event"] for event in read_events(run_dir)].count("worker_lost") == 1
    check(run_dir, clean, world)


def test_a_killed_node(world, clean):
    id, run_dir = world.submit("node")
    wait_for(reached(run_dir, 50))
    node = world.apart_from_head(run_dir).node
    world.cluster.do("kill", str(node))
    wait_for(reached(run_dir, 1, attempt=2))
    assert node not in {process.node for process in ranks_of(run_dir, steps_of(run_dir)[0]).values()}
    world.cluster.do("start", str(node))
    world.cluster.finish(id, run_dir)
    check(run_dir, clean, world)


@pytest.mark.parametrize("seconds", [30, 120])
def test_a_cut_network(world, clean, seconds):
    id, run_dir = world.submit(f"cut-{seconds}")
    wait_for(reached(run_dir, 50))
    node = world.apart_from_head(run_dir).node
    world.cluster.do("cut", str(node))
    before = steps_of(run_dir)
    healing = threading.Timer(seconds, world.cluster.do, ("heal", str(node)))
    healing.start()
    world.cluster.finish(id, run_dir)
    healing.join()
    assert before[1] < STEPS
    check(run_dir, clean, world)
    world.mend(node)


def test_a_killed_head_and_one_command(world, clean):
    id, run_dir = world.submit("head")
    wait_for(reached(run_dir, 50))
    world.cluster.do("kill", str(HEAD))
    world.cluster.do("start", str(HEAD))
    assert world.cluster.job(id)["state"] == "LOST"
    again = world.cluster.muster("retry", id).splitlines()[0]
    world.cluster.finish(again, run_dir)
    assert sorted(attempts_from(run_dir)) == [1, 2]
    check(run_dir, clean, world)


def test_twenty_kills_in_one_run(world, clean):
    """Of processes, and of the nodes they are on; the nodes come back."""
    schedule = kills(11, 20, STEPS - 60, 2, moments=("process", "process", "process", "process", "node"))
    id, run_dir = world.submit("twenty")
    attempt = 0
    for kill in schedule:
        wait_for(reached(run_dir, kill.step, attempt + 1))
        attempt, _ = steps_of(run_dir)
        victim = ranks_of(run_dir, attempt)[kill.rank]
        if kill.moment == "process" or victim.node == HEAD:
            os.kill(victim.pid, signal.SIGKILL)
        else:
            world.mend(victim.node)
    world.cluster.finish(id, run_dir)
    assert len(attempts_from(run_dir)) > len(schedule)
    check(run_dir, clean, world)


ELASTIC = (
    "parallel.dp=3", "cluster.workers=[1,3]", "train.global_batch=12", "train.micro_batch=2", "train.steps=900",
    # Smooth, as rounding over hundreds of steps sends a router's tokens elsewhere; of few, see tests/trainer.
    "model.num_experts=0", "model.dropout=0", "optim.lr=1e-4",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The elastic runs' config, trained by one process from its first step to its last."""
    name, run_dir = world.write("whole")
    config = load(world.cluster.user / name, [*ELASTIC, "cluster.workers=null", "parallel.dp=1"])
    assert train_in_process(prepare_run(config)) == 0
    return run_dir


def sizes(run_dir: Path) -> list[int]:
    return [event["world_size"] for event in read_events(run_dir) if event["event"] == "attempt_started"]


def check_within_tolerance(run_dir: Path, whole: Path) -> None:
    """The same samples in every step; losses as near as other numbers of processes come to each other."""
    assert use_by_step(run_dir) == use_by_step(whole)
    ours, theirs = ([m["loss"] for m in read_metrics(path) if "loss" in m] for path in (run_dir, whole))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_an_elastic_run_shrinks_and_grows_again(world, whole):
    id, run_dir = world.submit("elastic", *ELASTIC)
    wait_for(reached(run_dir, 50))
    node = world.apart_from_head(run_dir).node
    world.cluster.do("kill", str(node))
    wait_for(reached(run_dir, 1, attempt=2))
    world.cluster.do("start", str(node))
    world.cluster.finish(id, run_dir)
    assert sizes(run_dir) == [3, 2, 3]
    assert max(rolled_back(run_dir)) <= 1
    check_within_tolerance(run_dir, whole)


def test_a_machine_that_is_taken_back_is_left_after_a_checkpoint(world, whole):
    id, run_dir = world.submit("drained", *ELASTIC)
    wait_for(reached(run_dir, 50))
    node = world.apart_from_head(run_dir).node
    code = (
        "import ray; ray.init(log_to_driver=False); "
        f"print([n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeManagerHostname'] == 'node-{node}'][0])"
    )
    ray_id = world.cluster.do("exec", str(HEAD), sys.executable, "-c", code).split()[-1]
    notice = (
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        "60",
    )
    world.cluster.do(
        "exec", str(HEAD), str(Path(sys.executable).with_name("ray")), "drain-node", "--node-id", ray_id, *notice
    )
    wait_for(reached(run_dir, 1, attempt=2))
    events = read_events(run_dir)
    [end] = [event for event in events if event["event"] == "attempt_ended"]
    assert end["status"] == "STOPPED"
    assert [event["step"] for event in events if event["event"] == "checkpoint"][-1] == end["step"]
    assert "will leave in " in next(e["reason"] for e in events if e["event"] == "policy" and e["action"] == "retry")
    assert sizes(run_dir) == [3, 2]
    world.cluster.finish(id, run_dir)
    check_within_tolerance(run_dir, whole)
    world.mend(node)


BAD = 2
"""A node that is not the head."""


def check_left_out(run_dir: Path, whole: Path, words: str) -> None:
    """One machine was named, and the others trained the run without it, from its first step to its last."""
    [failure] = [event for event in read_events(run_dir) if event["event"] in ("worker_failed", "worker_lost")]
    assert (failure["event"], failure["kind"]) == ("worker_failed", "infrastructure")
    assert words in failure["reason"]
    assert set(re.findall(r"node-\d", failure["reason"])) == {f"node-{BAD}"}
    last, _ = steps_of(run_dir)
    assert {record["attempt"] for record in read_metrics(run_dir)} == {last}
    assert {process.node for process in ranks_of(run_dir, last).values()} == {0, 1}
    check_within_tolerance(run_dir, whole)


def test_a_machine_without_the_shared_folder_is_left_out(world, whole):
    with world.cluster.hidden(BAD, world.folder / "runs"):
        id, run_dir = world.submit("no-mount", *ELASTIC)
        world.cluster.finish(id, run_dir)
    check_left_out(run_dir, whole, f"{run_dir} does not exist on node-{BAD}: run.root must be")
    assert sizes(run_dir) == [2]


def test_a_machine_that_computes_wrong_is_left_out(world, whole):
    name, run_dir = world.write("products")
    with (world.folder / "products_ledger.py").open("a") as plugin:
        plugin.write(f"import socket\n\nif socket.gethostname() == 'node-{BAD}':\n")
        plugin.write("    import bad_machines\n\n    bad_machines.wrong_product()\n")
    world.cluster.finish(world.cluster.submit(name, *ELASTIC), run_dir)
    check_left_out(run_dir, whole, "a matrix product gave a wrong result")
    assert sizes(run_dir) == [3, 2]
    bad, sound = [event for event in read_events(run_dir) if event["event"] == "preflight"]
    [broken] = bad["broken"]
    assert re.fullmatch(rf"node-{BAD} \(rank \d\): a matrix product gave a wrong result", broken)
    assert [len(each["machines"]) for each in (bad, sound)] == [3, 2]
    assert sound["broken"] == []
