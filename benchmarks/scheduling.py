"""Many tiny runs on a cluster of many simulated nodes: throughput, latency, nothing lost, nothing trained twice.

Each node is a raylet of its own with one CPU; the runs go through `cluster.attempts.many_runs` (a gang for each node,
warm between runs). Meanwhile a training process is killed and a node is lost. What happened is read from the runs' own
records.
Run: `python benchmarks/scheduling.py` (500 runs on 8 nodes; ten minutes on two cores).
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--nodes", type=int, default=8)
    options = parser.parse_args()
    for key in [key for key in os.environ if key.startswith("RAY_")]:
        del os.environ[key]
    with tempfile.TemporaryDirectory(prefix="msb-", dir="/tmp") as folder:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(folder) / "token")
        measure(Path(folder), options.runs, options.nodes)


def measure(folder: Path, count: int, nodes: int) -> None:
    from cluster.gangs.access_token import make_token

    make_token()
    import ray
    from ray.cluster_utils import Cluster

    from cluster.attempts.many_runs import Trials
    from cluster.attempts.tasks import Task
    from cluster.gangs.share import Share
    from cluster.server.waiting import Gang
    from trainer.record.lines import read_events

    here = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, here))
    began = time.time()
    run_dirs = prepare(folder, count)
    prepared = time.time()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    others = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(nodes - 1)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    start = time.time()
    environment = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}

    class InOrder:
        left = list(run_dirs)

        def next(self) -> Task | None:
            return Task(Gang(1, Share(1.0, 0.0)), partial(self.left.pop, 0)) if self.left else None

        def more(self) -> bool:
            return bool(self.left)

    ended = []
    for end in Trials(InOrder(), lambda each: environment, joined=True, folder=str(folder)):
        ended.append(end)
        if len(ended) == count // 3:
            kill_one(run_dirs)
        if len(ended) == 2 * count // 3:
            cluster.remove_node(others[0], allow_graceful=False)
    took = time.time() - start
    ray.shutdown()
    cluster.shutdown()

    for end in ended:
        if end.status != "FINISHED":
            print(f"{end.run_dir.name}: {end.status} {end.reason}")
    events = {run_dir: read_events(run_dir) for run_dir in run_dirs}
    finished = sum(end.status == "FINISHED" for end in ended)
    attempts = [sum(event["event"] == "attempt_started" for event in found) for found in events.values()]
    steps = [[m["step"] for m in recorded(run_dir)] for run_dir in run_dirs]
    whole = sum(found == list(range(1, STEPS + 1)) for found in steps)
    begun = [run_dir for run_dir in run_dirs if recorded(run_dir)]
    first = [recorded(run_dir)[0]["time"] for run_dir in begun]
    own = [time - starts(events[run_dir])[0] for run_dir, time in zip(begun, first, strict=True)]
    waited = sorted(time - start for time in first)
    print(f"{count} runs of {STEPS} steps, {nodes} nodes of one CPU; prepared in {prepared - began:.0f} s")
    print(f"{took:.0f} s: {count / took:.2f} runs per second")
    print(f"from submission to the first step: median {statistics.median(waited):.0f} s, last {waited[-1]:.0f} s")
    print(f"of that for the run's own start: median {statistics.median(own):.2f} s")
    print(f"finished {finished}, with every step once {whole}")
    print(f"attempts: {sum(attempts)}; {attempts.count(1)} runs had one")
    if (finished, whole) != (count, count):
        raise SystemExit("something was lost")


def prepare(folder: Path, count: int) -> list[Path]:
    from configs import from_dict
    from configs.sections.data import PrepareConfig
    from trainer.data.prepare.prepare import prepare as prepare_data
    from trainer.run.folder import prepare_run

    raw = folder / "raw.jsonl"
    texts = ["".join(f"def f{j}(x):\n    return x * {i * j % 97} + {i}\n" for j in range(20)) for i in range(100)]
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = folder / "data"
    prepare_data([str(raw)], data, PrepareConfig(tokenizer="bytes", held_out=0.2), workers=1, progress=False)
    tree = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "num_experts": 4, "expert_size": 32},
        "train": {"steps": STEPS, "global_batch": 4, "seq_len": 32, "precision": "fp32", "sample_tokens": 0,
                  "eval_sequences": 4},
        "data": {"path": str(data)},
        "tracking": {"enabled": False},
    }  # fmt: skip
    runs = [{"run": {"name": f"trial-{i:04d}", "root": str(folder / "runs"), "seed": i}} for i in range(count)]
    return [prepare_run(from_dict(tree | run)) for run in runs]


def recorded(run_dir: Path) -> list[dict]:
    from trainer.record.lines import read_metrics

    return [record for record in read_metrics(run_dir) if "loss" in record]


def starts(events: list[dict]) -> list[float]:
    return [event["time"] for event in events if event["event"] == "attempt_started"]


def kill_one(run_dirs: list[Path]) -> None:
    """Kill a training process."""
    from trainer.record.lines import read_events

    for run_dir in run_dirs:
        found = read_events(run_dir)
        begun = [event["pid"] for event in found if event["event"] == "attempt_started"]
        if begun and not any(event["event"] == "attempt_ended" for event in found):
            os.kill(begun[-1], signal.SIGKILL)
            return


if __name__ == "__main__":
    main()
