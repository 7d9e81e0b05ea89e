"""Seconds of one core to fit L = E + A / N^alpha + B / D^beta to 240 runs: from cold, and 4,000 bootstrap refits.

It is compared with the PyPI package `chinchilla` (a grid of 3,125 starts as in its README, each minimised by BFGS), in
an environment of its own (`python -m venv peer; peer/bin/pip install chinchilla`). Both minimise Huber(1e-3) on log
loss over the same simulated runs; the objective that each reaches is printed, too.

Run: `python benchmarks/scaling_fit.py --peer peer/bin/python`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # one core, before numpy is imported

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.scaling.forms.dense import Approach3  # noqa: E402
from models.scaling.forms.solve import refit, solve  # noqa: E402

LAW = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
"""Hoffmann et al., arXiv:2203.15556, eq. 10."""
NOISE = 0.005
"""Standard deviation of the log loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--refits", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed; the median counts")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has chinchilla (takes minutes)")
    arguments = parser.parse_args()
    form = Approach3()
    c = np.repeat(np.geomspace(1e18, 1e21, 12), 20)
    n = np.sqrt(c / 120) * np.tile(np.geomspace(0.2, 5, 20), 12)
    x = {"n": n, "d": c / (6 * n)}
    generator = np.random.default_rng(0)
    loss = np.exp(form.log_loss(form.parameters(LAW)[None], x)[0] + generator.normal(0, NOISE, len(c)))
    weights = generator.multinomial(len(c), np.full(len(c), 1 / len(c)), size=arguments.refits).astype(float)

    found = solve(form, x, loss)
    cold = timed(lambda: solve(form, x, loss), arguments.rounds)
    many = timed(lambda: refit(form, x, loss, weights, found.parameters), arguments.rounds)
    _, converged = refit(form, x, loss, weights, found.parameters)
    print("| | CPU s, median (min to max) | objective | |")
    print("|---|---|---|---|")
    print(f"| muster, from cold | {spread(cold)} | {found.value:.9f} | {found.agreeing} of {found.candidates} agree |")
    print(f"| muster, {len(weights)} refits | {spread(many)} | | {converged.mean():.1%} converged |")
    if arguments.peer:
        runs = {"N": x["n"].tolist(), "D": x["d"].tolist(), "C": c.tolist(), "loss": loss.tolist()}
        with tempfile.TemporaryDirectory() as folder:
            command = [arguments.peer, "-c", PEER, folder]
            done = subprocess.run(command, input=json.dumps(runs), stdout=subprocess.PIPE, text=True, check=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        value = objective(form, form.parameters(theirs["law"]), x, loss)
        times = theirs["seconds"] / statistics.median(cold)
        print(
            f"| chinchilla {theirs['version']}, from cold | {theirs['seconds']:.1f} | {value:.9f} | {times:.0f} times |"
        )


PEER = """
import json, logging, sys, time
from importlib.metadata import version
import numpy as np
from chinchilla import Chinchilla
def huber(y_true, y_pred, delta=1e-3):
    error = np.abs(np.log(y_true) - np.log(y_pred))
    near = np.minimum(error, delta)
    return near * (error - 0.5 * near)
runs = json.load(sys.stdin)
grid = dict(E=np.linspace(1, 2, 5), a=np.linspace(1, 10, 5), b=np.linspace(1, 10, 5),
            alpha=np.linspace(0.1, 0.7, 5), beta=np.linspace(0.1, 0.7, 5))
cc = Chinchilla(sys.argv[1], param_grid=grid, loss_fn=huber, log_level=40)
for values in zip(*runs.values()):
    cc.append(**dict(zip(runs, values)))
began = time.process_time()
cc.fit(parallel=False)
took = time.process_time() - began
law = {name: float(getattr(cc, name)) for name in ("E", "A", "B", "alpha", "beta")}
print(json.dumps({"law": law, "seconds": took, "version": version("chinchilla")}))
"""


def objective(form: Approach3, parameters: np.ndarray, x: dict[str, np.ndarray], loss: np.ndarray) -> float:
    """sum Huber(1e-3) of the log residuals."""
    error = np.abs(form.log_loss(parameters[None], x)[0] - np.log(loss))
    near = np.minimum(error, 1e-3)
    return float((near * (error - 0.5 * near)).sum())


def timed(function: Callable[[], object], rounds: int) -> list[float]:
    """CPU seconds of each round."""
    took = []
    for _ in range(rounds):
        began = time.process_time()
        function()
        took.append(time.process_time() - began)
    return took


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
