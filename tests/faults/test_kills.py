"""kill -9 at seeded moments, two processes under torchrun's rules: the run ends bit for bit as one left alone."""

from pathlib import Path

import pytest
from faults import killed
from ledger import SAMPLE_TOKENS, plugin
from proofs import (
    check_each_sample_once_per_epoch,
    digest,
    losses,
    order_of_use,
    prepare_samples,
    rolled_back,
    samples_in,
)
from ranks import run_ranks
from schedule import MOMENTS, Kill, kills
from support import tiny

from configs import to_yaml
from trainer.record.lines import read_events, summary

STEPS, BATCH, EVERY = 40, 8, 4


class Runs:
    """Runs of one config, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, prepare_samples(folder, 128)

    def __call__(self, name: str, schedule: list[Kill]) -> Path:
        """Start a run again, as a restart loop does, until it has met every kill of the schedule and is finished."""
        run_dir = self.folder / "runs" / name
        config = tiny(
            run={"name": name, "root": str(self.folder / "runs")},
            model={"dropout": 0.1},
            train={"steps": STEPS, "global_batch": BATCH, "seq_len": SAMPLE_TOKENS, "eval_every": STEPS // 2},
            data={"path": str(self.data)},
            parallel={"dp": 2, "zero_stage": 2},
            checkpoint={"every": EVERY},
        ).model_copy(update={"plugins": (plugin(self.folder / f"{name}_ledger.py", run_dir / "ledger"),)})
        (self.folder / f"{name}.yaml").write_text(to_yaml(config))
        for kill in [*schedule, None]:
            ends = run_ranks(self.folder, [f"{name}.yaml"], before=killed, given=(kill,), grace_s=2)
            codes = [code for code, _ in ends]
            if kill:
                assert codes[kill.rank] == -9, (kill, codes)
            else:
                assert codes == [0, 0]
        return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def clean(runs) -> Path:
    return runs("clean", [])


@pytest.fixture(scope="module", params=[pytest.param((5, 4), id="4 kills", marks=pytest.mark.slow),
                                        pytest.param((7, 24), id="24 kills", marks=pytest.mark.slow)])  # fmt: skip
def schedule(request) -> list[Kill]:
    seed, count = request.param
    return kills(seed, count, STEPS, 2)


@pytest.fixture(scope="module")
def run_dir(runs, schedule) -> Path:
    return runs(f"killed-{len(schedule)}", schedule)


def test_a_schedule_is_a_function_of_its_seed():
    assert kills(5, 4, STEPS, 2) == kills(5, 4, STEPS, 2) != kills(6, 4, STEPS, 2)
    drawn = kills(7, 24, STEPS, 2)
    assert [kill.step for kill in drawn] == sorted(kill.step for kill in drawn)
    assert {kill.moment for kill in drawn[:4]} == set(MOMENTS)
    assert {kill.rank for kill in drawn} == {0, 1}


def test_every_kill_ended_an_attempt(run_dir, schedule):
    ended = [event for event in read_events(run_dir) if event["event"] == "attempt_ended"]
    assert summary(run_dir)["attempts"] == len(schedule) + 1
    assert [event["status"] for event in ended if event["attempt"] == len(schedule) + 1] == ["FINISHED"]


def test_the_weights_are_those_of_a_clean_run(run_dir, clean):
    assert digest(run_dir, STEPS) == digest(clean, STEPS) != digest(clean, STEPS - EVERY)


def test_the_loss_record_is_that_of_a_clean_run(run_dir, clean):
    assert losses(run_dir) == losses(clean)
    assert [record[0] for record in losses(clean) if record[1] is not None] == list(range(1, STEPS + 1))


def test_every_sample_is_used_once_per_epoch(run_dir, clean, runs):
    used = order_of_use(run_dir, 2)
    assert used == order_of_use(clean, 2)
    check_each_sample_once_per_epoch(used, samples_in(runs.data))


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, -1], ids=["in a whole epoch", "in the last"])
def test_a_sample_used_twice_would_be_seen(clean, runs, place):
    used = order_of_use(clean, 2)
    used[place] = used[place - 1 if place else 1]
    with pytest.raises(AssertionError):
        check_each_sample_once_per_epoch(used, samples_in(runs.data))


def test_a_kill_takes_back_at_most_one_checkpoint(run_dir, schedule):
    back = rolled_back(run_dir)
    assert len(back) == len(schedule)
    assert max(back) <= 1
