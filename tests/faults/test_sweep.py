"""A sweep on three real Ray nodes that loses a machine, or the head: every trial ends as in one left alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_cluster import LocalCluster, missing, ranks_of, steps_of, wait_for
from proofs import losses, prepare_samples, rolled_back

from trainer.record.lines import read_events, summary

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=str(missing()))]

HEAD = 0
BASE = """
model: {{num_layers: 2, hidden_size: 32, num_heads: 2, num_experts: 4, expert_size: 32, dropout: 0.1}}
train: {{steps: 200, global_batch: 8, seq_len: 16, precision: fp32, eval_sequences: 4}}
data: {{path: {data}}}
parallel: {{dp: 2, zero_stage: 2}}
cluster: {{max_failures: 20}}
"""
SWEEP = """
base: base.yaml
root: {root}
set: {{checkpoint.every: 20, tracking.enabled: false}}
grid: {{}}
axes: {{optim.lr: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("nodes")
    user = folder / "user"
    user.mkdir()
    (user / "base.yaml").write_text(BASE.format(data=prepare_samples(folder, 128)))
    (user / "sweep.yaml").write_text(SWEEP.format(root=folder / "runs"))
    with LocalCluster(3, user) as cluster:
        if cluster.url.startswith("http://127."):
            pytest.skip("the nodes share the loopback")
        yield cluster


def submit(cluster: LocalCluster, name: str) -> tuple[str, Path]:
    """(id of the job, the sweep's folder); two trials of two processes each find room under its limit."""
    id = cluster.muster("sweep", "submit", "sweep.yaml", f"name={name}", "--gpus", "4").splitlines()[0]
    return id, cluster.user.parent / "runs" / name


def trials(sweep_dir: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted((sweep_dir / "trials").glob("*"))}


@pytest.fixture(scope="module")
def clean(cluster) -> Path:
    id, sweep_dir = submit(cluster, "clean")
    cluster.finish(id, sweep_dir)
    return sweep_dir


def check(swept: Path, clean: Path) -> None:
    assert len(trials(swept)) == 5
    assert set(trials(swept)) == set(trials(clean))
    for name, path in trials(swept).items():
        assert losses(path) == losses(trials(clean)[name])
        assert losses(path)[-1][0] == 200
        assert max(rolled_back(path), default=0) <= 1


def test_a_killed_node(cluster, clean):
    id, swept = submit(cluster, "node")

    def away() -> list[int]:
        """Nodes other than the head that train a trial which has begun."""
        ranks = [ranks_of(path, steps_of(path)[0]) for path in trials(swept).values() if steps_of(path)[1] >= 30]
        return [process.node for each in ranks for process in each.values() if process.node != HEAD]

    wait_for(away)
    node = away()[0]
    cluster.do("kill", str(node))
    wait_for(lambda: any(steps_of(path)[0] > 1 for path in trials(swept).values()))
    cluster.do("start", str(node))
    cluster.finish(id, swept)
    check(swept, clean)
    assert any(steps_of(path)[0] > 1 for path in trials(swept).values())


def test_a_killed_head_and_one_command(cluster, clean):
    id, swept = submit(cluster, "head")

    def over() -> set[str]:
        return {name for name, path in trials(swept).items() if summary(path)["status"] == "FINISHED"}

    wait_for(over)
    cluster.do("kill", str(HEAD))
    finished = over()
    cluster.do("start", str(HEAD))
    assert cluster.job(id)["state"] == "LOST"
    again = cluster.muster("retry", id).splitlines()[0]
    cluster.finish(again, swept)
    check(swept, clean)
    starts = [e["trial"] for e in read_events(swept) if e["event"] == "trial_started" and e["attempt"] == 2]
    assert sorted(starts) == sorted(set(trials(swept)) - finished)
    assert "5/5 trials finished" in cluster.muster("status", again)
    assert [event["cpus"] for event in read_events(swept) if event["event"] == "cluster"] == [4.0, 4.0]
