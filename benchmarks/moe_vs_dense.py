"""Does a Mixture-of-Experts learn better than a dense model of equal training FLOPs, and how is it best balanced?

A small experiment, run by the real trainer: models of 1.7M to 5.2M parameters, a twentieth of an epoch of this
machine's own Python standard library, three seeds, one learning rate for all. It can show that each variant trains and
balances as it should, and differences that are large compared with the spread over seeds. It cannot rank variants
within that spread, nor predict another size or longer training: experts take time to specialise, balancing methods are
known to differ by hundredths of a nat, and nothing was tuned for any variant. Equal FLOPs are not equal time. Held-out
text is other files of the same library.

Run: `python benchmarks/moe_vs_dense.py --plot benchmarks/moe_vs_dense.png`. A run that was stopped continues where it
stopped; `--table` shows the results so far. CPU; each trial is a run in a folder of its own below runs/.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs import Config, ConfigError, from_dict, resolve
from models.moe.collapse import STARVED
from models.planning.cost import parameters, training_flops_per_token
from trainer.data.default import ensure_prepared, vocabulary_size
from trainer.data.manifest import read_manifest
from trainer.observe.plots.draw import BLUE, GREY, ORANGE, STYLE
from trainer.record.lines import read_metrics, summary
from trainer.run.folder import is_finished, prepare_run, read_config

BUDGET = 4e12
"""Training FLOPs of a trial: about 240 steps."""
WIDTH = 320
"""Width of the SwiGLU that a token passes: the dense layer, or its top_k experts and the shared one together."""
AUX, BIAS_RATE = 0.01, 0.01
"""As in Switch Transformers; ten times DeepSeek-V3's rate, because there are only a few hundred steps."""
SHARED: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "z_loss_weight": 0.0},
    # A micro-batch is a quarter of a step, so that balancing it differs from balancing the global batch.
    "train": {"global_batch": 8, "micro_batch": 2, "seq_len": 256, "precision": "fp32", "eval_sequences": 256,
              "sample_tokens": 0},
    "optim": {"lr": 2e-3, "schedule": "cosine"},
    "checkpoint": {"every": 0},
    "tracking": {"enabled": False},
}  # fmt: skip
WARMUP = 0.1
"""Share of the steps."""
TOP2 = {"num_experts": 8, "top_k": 2, "expert_size": WIDTH // 2, "aux_loss_weight": 0.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"intermediate_size": WIDTH}),
    "switch": ("top-1 of 8 (Switch)", {
        # The renormalised weight of a single expert is always 1: the router would learn nothing.
        "num_experts": 8, "top_k": 1, "expert_size": WIDTH, "norm_topk_prob": False, "capacity_factor": 1.25,
        "router_jitter": 0.01, "aux_loss_weight": AUX}),
    "fine": ("top-4 of 32, a shared expert", {
        "num_experts": 32, "top_k": 4, "expert_size": WIDTH // 5, "shared_expert_size": WIDTH // 5,
        "aux_loss_weight": AUX}),
    "top2": ("top-2 of 8: loss per micro-batch", TOP2 | {"aux_loss_weight": AUX}),
    "sequence": ("top-2 of 8: loss per sequence", TOP2 | {"aux_loss_weight": AUX, "aux_loss_over": "sequence"}),
    "global": ("top-2 of 8: loss over global batch", TOP2 | {"aux_loss_weight": AUX, "aux_loss_over": "global_batch"}),
    "bias": ("top-2 of 8: loss-free bias", TOP2 | {"router_bias_rate": BIAS_RATE}),
    "sigmoid": ("top-2 of 8: bias, sigmoid scores", TOP2 | {
        "router": "sigmoid", "router_bias_rate": BIAS_RATE, "aux_loss_over": "sequence", "aux_loss_weight": 1e-4}),
    "zloss": ("top-2 of 8: z-loss only", TOP2 | {"z_loss_weight": 0.001}),
    "none": ("top-2 of 8: no balancing", TOP2),
}  # fmt: skip
"""Name of the runs: (label, keys of `model`)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"training FLOPs of a trial (default {BUDGET:g})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="trials at a time, which share the cores"
    )
    parser.add_argument("--table", action="store_true", help="train nothing, only show the finished trials")
    parser.add_argument("--plot", type=Path, help="draw held-out loss and MaxVio into this PNG file")
    arguments = parser.parse_args()
    root = Path("runs") / f"moe_vs_dense-{arguments.budget:.3g}".replace("+", "")
    if not arguments.table:
        # Seed by seed, so that an interrupted run still compares all variants.
        pairs = [(variant, seed) for seed in arguments.seeds for variant in arguments.only]
        try:
            train_all(pairs, arguments.budget, root, arguments.workers)
        except ConfigError as error:
            sys.exit(str(error))
    results = {
        variant: found
        for variant in VARIANTS
        if variant in arguments.only and (found := read_trials(root, variant, arguments.seeds))
    }
    if not results:
        sys.exit(f"{root} has no finished trial")
    print(table(results, arguments.budget))
    if arguments.plot:
        plot(results, arguments.plot)


def trial_config(variant: str, seed: int, budget: float, root: Path, data: str, vocabulary: int) -> Config:
    """The config of a trial whose number of steps spends `budget` training FLOPs."""
    name, keys = f"{variant}-seed{seed}", VARIANTS[variant][1]
    sections = {"run": {"name": name, "root": str(root), "seed": seed}, "data": {"path": data}} | SHARED
    config = from_dict(sections | {"model": SHARED["model"] | keys})
    steps = max(1, round(budget / spent(config, vocabulary) * config.train.steps))
    return from_dict(sections | {
        "model": SHARED["model"] | keys, "train": SHARED["train"] | {"steps": steps},
        "optim": SHARED["optim"] | {"warmup": round(WARMUP * steps)},
    })  # fmt: skip


def spent(config: Config, vocabulary: int) -> float:
    """Training FLOPs of a whole trial."""
    train, model = config.train, resolve(config, vocab_size=vocabulary)[0].model
    return training_flops_per_token(model, train.seq_len) * train.seq_len * train.global_batch * train.steps


def train_all(pairs: Sequence[tuple[str, int]], budget: float, root: Path, workers: int) -> None:
    """Train what is not finished yet, `workers` trials at a time, each in a process that imports once."""
    data, _ = ensure_prepared(from_dict({"run": {"root": "runs"}}))
    vocabulary = vocabulary_size(data)
    trials = [trial_config(variant, seed, budget, root, str(data.path), vocabulary) for variant, seed in pairs]
    if off := {t.run.name: t.train.steps for t in trials if abs(spent(t, vocabulary) / budget - 1) > 0.01}:
        print(f"more than 1% off the budget, raise --budget: {off} steps", file=sys.stderr)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))  # for the processes started below
    context = multiprocessing.get_context("spawn")
    turn = context.Value("i", 0)
    team = [context.Process(target=work, args=(trials, turn), daemon=True) for _ in range(workers)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for process in team:
            process.start()
        for process in team:
            process.join()
    except KeyboardInterrupt:
        turn.value = len(trials)
        for process in team:
            process.terminate()  # the trainer writes a checkpoint and exits
            process.join()
        sys.exit("stopped; run the same command to continue")
    if any(process.exitcode for process in team):
        print("a trial failed, see above: the table leaves it out", file=sys.stderr)


def work(trials: Sequence[Config], turn: Any) -> None:
    """Train one after another the trials that no other process has taken."""
    from trainer.loop import train  # imports DeepSpeed, which only these processes need

    while True:
        with turn.get_lock():
            mine, turn.value = turn.value, turn.value + 1
        if mine >= len(trials):
            return
        try:
            run_dir, start = prepare_run(trials[mine]), time.perf_counter()
        except ConfigError as error:
            sys.exit(str(error))
        if is_finished(run_dir):
            continue
        if train(run_dir) != "FINISHED":
            return
        shutil.rmtree(run_dir / "checkpoints")  # 20 to 70 MB that nothing resumes from
        took, loss = time.perf_counter() - start, summary(run_dir)["eval_loss"]
        steps = trials[mine].train.steps
        print(f"{mine + 1}/{len(trials)} {run_dir.name}: held-out {loss:.4f}, {steps} steps, {took:.0f} s", flush=True)


@dataclass(frozen=True)
class Trial:
    """The results of a finished trial; router figures are means over the last tenth of its steps, NaN if dense."""

    config: Config
    seed: int
    loss: float
    """Held-out, nats per token."""
    maxvio: float
    """Largest load / even load - 1, in a global batch; mean over layers."""
    dead: int
    """Experts of all layers that took under `models.moe.collapse.STARVED` of their fair share."""
    dropped: float
    """Fraction of the assignments."""


def read_trials(root: Path, variant: str, seeds: Sequence[int]) -> list[Trial]:
    """The finished trials of one variant."""
    folders = [(seed, root / f"{variant}-seed{seed}") for seed in seeds]
    return [read_trial(folder, seed) for seed, folder in folders if folder.is_dir() and is_finished(folder)]


def read_trial(run_dir: Path, seed: int) -> Trial:
    config, records = read_config(run_dir), read_metrics(run_dir)
    steps = [record for record in records if "eval_loss" not in record]
    loss = next(record["eval_loss"] for record in records if "eval_loss" in record)
    last = steps[-max(1, len(steps) // 10) :]
    if not config.model.is_moe:
        return Trial(config, seed, loss, np.nan, 0, np.nan)
    load_SLE = np.array([record["expert_load"] for record in last])
    return Trial(
        config, seed, loss,
        maxvio=float(np.mean([record["expert_maxvio"] for record in last])),
        dead=int((load_SLE.mean(0) * load_SLE.shape[-1] < STARVED).sum()),
        dropped=float(np.mean([record.get("dropped", np.nan) for record in last])),
    )  # fmt: skip


def table(results: dict[str, list[Trial]], budget: float) -> str:
    """Markdown: what was kept equal, and a row per variant."""
    first = next(iter(results.values()))[0].config
    model, train = first.model, first.train
    entropy = read_manifest(Path(str(first.data.path))).splits["held_out"].entropy
    lines = [
        f"{budget:.3g} training FLOPs a trial (router included), {model.num_layers} layers, hidden "
        f"{model.hidden_size}, vocabulary {model.vocab_size}; {train.global_batch} x {train.seq_len} tokens a step in "
        f"micro-batches of {train.micro_batch} sequences; {train.precision}, AdamW, peak learning rate "
        f"{first.optim.lr:g}, cosine, warmup {WARMUP:.0%}, the same for all. A token passes SwiGLUs of {WIDTH} wide in "
        "all (dense layer = top_k x expert + shared), so only the router's FLOPs differ, and the number of steps makes "
        "up for them; total parameters differ.",
        "",
        f"Held-out loss in nats per token over the same {train.eval_sequences} sequences for all (unigram entropy "
        f"{entropy:.3f}). Router figures: last tenth of the steps; MaxVio: of the whole step, mean over layers (of 32 "
        f"experts each has fewer tokens, whose numbers vary more); dead: under {STARVED:.0%} of the fair share; "
        "dropped: of the assignments. Mean ± standard deviation over seeds.",
        "",
        "| | parameters, M | active, M | steps | FLOPs / budget | seeds | held-out loss | less dense's, same seed | "
        "MaxVio | dead experts | dropped |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    dense = {trial.seed: trial.loss for trial in results.get("dense", [])}
    for variant, trials in results.items():
        config = trials[0].config
        count = parameters(config.model)
        moe = sum(map(config.model.is_moe_layer, range(config.model.num_layers)))
        less = [trial.loss - dense[trial.seed] for trial in trials if trial.seed in dense]
        cells = [
            VARIANTS[variant][0],
            f"{count.total / 1e6:.2f}",
            f"{count.active / 1e6:.2f}",
            str(config.train.steps),
            f"{spent(config, config.model.vocab_size or 0) / budget:.4f}",
            str(len(trials)),
            spread([trial.loss for trial in trials]),
            spread(less, signed=True) if variant != "dense" else "",
            spread([trial.maxvio for trial in trials]),
            f"{statistics.mean(trial.dead for trial in trials):.1f} of {moe * config.model.num_experts}" if moe else "",
            spread([100 * trial.dropped for trial in trials], digits=1, unit="%"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], *, digits: int = 3, signed: bool = False, unit: str = "") -> str:
    """Mean ± standard deviation (n - 1); empty without values."""
    if not values or any(value != value for value in values):
        return ""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "") + unit


def plot(results: dict[str, list[Trial]], path: Path) -> None:
    """A row per variant: held-out loss, every seed a point, the mean a line; and MaxVio beside it."""
    rows = list(results)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 1.3 + 0.32 * len(rows)))
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        for row, variant in enumerate(rows):
            colour = ORANGE if variant == "dense" else BLUE
            losses = [trial.loss for trial in results[variant]]
            shown = [(left, losses)]
            if variant != "dense":
                shown.append((right, [trial.maxvio for trial in results[variant]]))
            for axes, values in shown:
                axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.65, markersize=5, markeredgewidth=0)
                axes.plot([statistics.mean(values)] * 2, [row - 0.3, row + 0.3], color="black", linewidth=1.2, zorder=1)
        if "dense" in results:
            mean = statistics.mean(trial.loss for trial in results["dense"])
            left.axvline(mean, color=GREY, linestyle="--", linewidth=0.9, zorder=0)
        left.set_yticks(range(len(rows)), [VARIANTS[variant][0] for variant in rows])
        left.set_ylim(len(rows) - 0.5, -0.5)
        left.set(xlabel="held-out loss (nats per token)")
        right.set(xlabel="MaxVio (max load / even − 1)", xscale="log")
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        right.xaxis.set_minor_formatter(NullFormatter())
        figure.suptitle(
            "Equal training FLOPs. A point is a seed, a line their mean; in both, left is better", fontsize=9
        )
        figure.savefig(path)


if __name__ == "__main__":
    main()
