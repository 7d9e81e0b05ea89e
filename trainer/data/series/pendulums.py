"""Made series: damped pendulums, seen at irregular times."""

import numpy as np
import pyarrow as pa

COUNT, TIMES, SECONDS = 1000, 20, 3.0
GRAVITY, FRICTION = 9.81, 0.3
"""Per length of 1 m, in 1/s^2, and in 1/s."""
NOISE, MISSING = 0.02, 0.3
"""Standard deviation of an observation, in radians or radians per second; share of the numbers that are missing."""
FINE = 10
"""Steps of the solver (RK4) between two times."""


def pendulums() -> pa.Table:
    """1,000 pendulums, each let go at an angle of up to 115 degrees: angle and angular velocity at 20 random times
    within 3 seconds, of which three tenths are missing."""
    random = np.random.default_rng(0)
    times = np.sort(random.uniform(0, SECONDS, (COUNT, TIMES)), 1)
    state = np.stack([random.uniform(-2, 2, COUNT), random.uniform(-2, 2, COUNT)])
    values, before = np.empty((COUNT, TIMES, 2)), np.zeros(COUNT)
    for place in range(TIMES):
        step = (times[:, place] - before) / FINE
        for _ in range(FINE):
            state = state + step * _mean_change(state, step)
        values[:, place], before = state.T, times[:, place]
    values += random.normal(0, NOISE, values.shape)
    seen = random.random(values.shape) >= MISSING
    rows = [
        [[float(number) if known else None for number, known in zip(*each, strict=True)]
         for each in zip(of, shown, strict=True)]
        for of, shown in zip(values.round(4), seen, strict=True)
    ]  # fmt: skip
    kind = pa.list_(pa.list_(pa.float64()))
    return pa.table({"times": pa.array(times.round(4).tolist()), "values": pa.array(rows, kind)})


def _change(state: np.ndarray) -> np.ndarray:
    """Of angle and angular velocity, [2, N], per second."""
    return np.stack([state[1], -GRAVITY * np.sin(state[0]) - FRICTION * state[1]])


def _mean_change(state: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Over a step, by the classical Runge-Kutta method."""
    one = _change(state)
    two = _change(state + step / 2 * one)
    three = _change(state + step / 2 * two)
    four = _change(state + step * three)
    return (one + 2 * two + 2 * three + four) / 6
