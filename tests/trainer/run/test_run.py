"""A run as its user sees it: exact resume after every kind of end, refusals, and what the record says."""

import json
import signal
import threading
import time

import pytest
from faults import hang_up_under_nohup, kill_at_step, kill_in, poison, raise_loss, trained
from support import tiny, train_in_process
from teams import in_team

from configs import ConfigError, load
from configs.sections.data import PrepareConfig
from trainer.checkpoint import manifest
from trainer.checkpoint.store import Reader
from trainer.data.prepare.prepare import prepare
from trainer.record.lines import Record, read_events, read_metrics
from trainer.run.folder import prepare_run, read_config

STEPS = 8
PHASES = [
    # (function of trainer.checkpoint.store that kills, which call of it): the save at step 4 is the second one
    ("save_file", 2, "before"),
    ("save_file", 2, "after"),
    ("digest", 2, "before"),
    ("write_durably", 3, "before"),  # the second save's receipt
    ("write_durably", 4, "before"),  # its manifest
    ("write_durably", 4, "after"),
    ("remove", 1, "before"),
    ("remove", 1, "half"),
]


def make(root, data, name="run", **sections):
    settings = {
        "run": {"name": name, "root": str(root)},
        "data": {"path": str(data)},
        "train": {"steps": STEPS, "eval_every": 4, "sample_tokens": 4, "micro_batch": 2},
        "checkpoint": {"every": 2, "keep": 2},
        # All that a step depends on beside weights and moments: what routers remember, noise by sequence.
        "model": {"dropout": 0.1, "router_jitter": 0.1, "router_bias_rate": 0.01, "aux_loss_over": "global_batch"},
    }
    for section, keys in sections.items():
        settings[section] = settings.get(section, {}) | keys
    return prepare_run(tiny(**settings))


def final_state(run_dir):
    reader = Reader(manifest.folder(run_dir, STEPS))
    routers = reader.manifest.state.memory
    assert max(map(max, routers["router.bias"])) > 0
    return routers | {
        (k, n): reader.read(k, n).numpy().tobytes() for k in reader.states for n in reader.manifest.shapes[k]
    }


def losses(run_dir):
    return [(m["step"], m.get("loss"), m.get("eval_loss"), m.get("grad_norm")) for m in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def clean(tmp_path_factory, tiny_data):
    """A run that was never stopped."""
    run_dir = make(tmp_path_factory.mktemp("clean"), tiny_data)
    assert train_in_process(run_dir) == 0
    return run_dir


def assert_same(run_dir, clean):
    assert losses(run_dir) == losses(clean)
    assert final_state(run_dir) == final_state(clean)


def test_a_presets_warmup_stays_that_of_the_run(tmp_path, tiny_data):
    """It follows train.steps, which a run may change, and its own may not."""
    tiny_model = [f"run.root={tmp_path}", f"data.path={tiny_data}", "model.hidden_size=32", "tracking.enabled=false"]

    def asked(*overrides):
        return load("quickstart", [*tiny_model, *overrides])

    run_dir = prepare_run(asked("train.steps=10"))
    assert read_config(run_dir).optim.warmup == 1
    assert read_config(prepare_run(asked("train.steps=30"))).optim.warmup == 3, "it has not begun"
    Record(run_dir, 1).event("attempt_started", inputs=[])
    assert read_config(prepare_run(asked())).optim.warmup == 3
    with pytest.raises(ConfigError, match=r"optim\.warmup was 3 and is now 50"):
        prepare_run(asked("optim.warmup=50"))
    with pytest.raises(ConfigError, match=r"exists with optim\.warmup=3, longer than train\.steps \(2\)"):
        prepare_run(asked("train.steps=2"))


def test_record_of_a_clean_run(clean):
    metrics, events = read_metrics(clean), read_events(clean)
    steps = [m for m in metrics if "loss" in m]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    assert [m["step"] for m in metrics if "eval_loss" in m] == [4, 8]
    assert steps[-1]["sequences"] == STEPS * 4
    assert {"lr", "grad_norm", "tokens", "tokens_per_second", "tflops", "memory_gb", "data_wait", "step_time",
            "aux_loss", "z_loss"} <= steps[-1].keys()  # fmt: skip
    assert [sum(layer) for layer in steps[-1]["expert_load"]] == pytest.approx([1.0, 1.0])
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [2, 4, 6, 8]
    assert manifest.committed(clean) == [6, 8]
    assert events[-1]["event"] == "attempt_ended"
    assert events[-1]["status"] == "FINISHED"
    assert sorted(p.name for p in (clean / "samples").glob("*.txt")) == ["step-00000004.txt", "step-00000008.txt"]


def test_a_run_without_held_out_documents_has_no_evaluation(tmp_path):
    (tmp_path / "x.txt").write_text("a few words " * 20)
    prepare([tmp_path / "x.txt"], tmp_path / "data", PrepareConfig(tokenizer="bytes", held_out=0.0), progress=False)
    run_dir = make(tmp_path, tmp_path / "data")
    assert train_in_process(run_dir) == 0
    assert [m["step"] for m in read_metrics(run_dir)] == list(range(1, STEPS + 1))
    [launched] = [event for event in read_events(run_dir) if event["event"] == "resolved"]
    assert any("no evaluation" in note for note in launched["derived"])
    assert read_events(run_dir)[-1]["status"] == "FINISHED"


@pytest.mark.few(3)
@pytest.mark.parametrize(("function", "call", "when"), PHASES)
def test_kill_9_while_a_checkpoint_is_written(tmp_path, tiny_data, clean, function, call, when):
    run_dir = make(tmp_path, tiny_data)
    assert train_in_process(run_dir, kill_in, function, call, when) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert_same(run_dir, clean)
    assert manifest.committed(run_dir) == [6, 8]


@pytest.mark.few(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(tmp_path, tiny_data, clean, number):
    """It travels with step 6, which is read when step 7 is under way."""
    run_dir = make(tmp_path, tiny_data, checkpoint={"every": 4})
    assert train_in_process(run_dir, kill_at_step, 6, number) == 75
    assert manifest.committed(run_dir)[-1] == 7
    # The checkpoint of step 4, written in the background, may be done only after the signal.
    events = [e for e in read_events(run_dir) if e["event"] != "checkpoint" or e["step"] != 4]
    assert [e["event"] for e in events[-3:]] == ["checkpoint", "measured", "attempt_ended"]
    assert events[-4]["event"] == "signal"
    assert events[-1]["status"] == "STOPPED"
    assert train_in_process(run_dir) == 0
    assert_same(run_dir, clean)


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal(tmp_path, tiny_data):
    run_dir = make(tmp_path, tiny_data)
    assert train_in_process(run_dir, hang_up_under_nohup, 2) == 0
    assert read_events(run_dir)[-1]["status"] == "FINISHED"


def test_stop_file_stops_the_run_too(tmp_path, tiny_data):
    """One that was there before costs no step."""
    run_dir = make(tmp_path, tiny_data)
    (run_dir / "stop").touch()
    assert train_in_process(run_dir) == 75
    end = read_events(run_dir)[-1]
    assert (end["status"], end["step"]) == ("STOPPED", 0)
    assert read_metrics(run_dir) == []


def test_all_processes_leave_at_the_same_step(tmp_path, tiny_data):
    """A signal that one of them hears in step 3, after which a checkpoint is due, and an evaluation after step 4."""
    run_dir = make(tmp_path, tiny_data, parallel={"dp": 2}, checkpoint={"every": 3})
    assert in_team(2, trained, run_dir, kill_at_step, (1,), 3, signal.SIGTERM) == ["STOPPED", "STOPPED"]
    assert manifest.committed(run_dir) == [3]
    alone = make(tmp_path, tiny_data, "later", parallel={"dp": 2}, checkpoint={"every": 0})
    assert in_team(2, trained, alone, kill_at_step, (1,), 3, signal.SIGTERM) == ["STOPPED", "STOPPED"]
    assert manifest.committed(alone) == [4]
    assert [(m["step"], "eval_loss" in m) for m in read_metrics(alone)][-2:] == [(4, False), (4, True)]


@pytest.mark.few(1)
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path, tiny_data, clean, damage):
    run_dir = make(tmp_path, tiny_data)
    assert train_in_process(run_dir, kill_at_step, 7, signal.SIGKILL) == -signal.SIGKILL
    newest = manifest.committed(run_dir)[-1]
    shard = manifest.folder(run_dir, newest) / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    shard.write_bytes(data if damage == "flip" else data[:-10])
    assert train_in_process(run_dir) == 0
    refused = [e for e in read_events(run_dir) if e["event"] == "checkpoint_refused"]
    assert [e["step"] for e in refused] == [newest]
    assert_same(run_dir, clean)


def test_another_model_is_refused_with_the_keys(tmp_path, tiny_data, clean):
    root = clean.parent
    with pytest.raises(ConfigError, match=r"optim.lr was 0.001 and is now 0.01.*\n.*--fork"):
        make(root, tiny_data, optim={"lr": 0.01})
    with pytest.raises(ConfigError, match=r"run\.seed"):
        make(root, tiny_data, run={"name": "run", "root": str(root), "seed": 3})


def test_allowed_changes_are_an_event_and_the_run_goes_further(tmp_path, tiny_data):
    run_dir = make(tmp_path, tiny_data, train={"steps": 4})
    assert train_in_process(run_dir) == 0
    run_dir = make(tmp_path, tiny_data, train={"steps": 6}, checkpoint={"every": 3})
    changed = [e for e in read_events(run_dir) if e["event"] == "config_changed"]
    assert changed[0]["changed"] == {"train.steps": [4, 6], "checkpoint.every": [2, 3]}
    assert train_in_process(run_dir) == 0
    assert [m["step"] for m in read_metrics(run_dir) if "loss" in m] == [1, 2, 3, 4, 5, 6]


def test_fork_starts_from_the_last_checkpoint(tmp_path, tiny_data, capsys):
    run_dir = make(tmp_path, tiny_data, train={"steps": 4})
    assert train_in_process(run_dir) == 0
    from configs import load

    config = load(run_dir / "config.yaml", ["optim.lr=1e-4", "train.steps=6"])
    forked = prepare_run(config, fork="other")
    assert "warning" not in capsys.readouterr().err
    prepare_run(load(run_dir / "config.yaml", ["model.rope_theta=5e5", "train.steps=6"]), fork="longer")
    assert "the weights of run.name=run will behave differently here: model.rope_theta was" in capsys.readouterr().err
    assert train_in_process(forked) == 0
    assert [m["step"] for m in read_metrics(forked) if "loss" in m] == [5, 6]
    assert [m["step"] for m in read_metrics(run_dir) if "loss" in m] == [1, 2, 3, 4]


def test_second_trainer_is_refused(tmp_path, tiny_data):
    import fcntl

    run_dir = make(tmp_path, tiny_data)
    with (run_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is being trained"):
            make(tmp_path, tiny_data)


def test_nonfinite_steps_are_skipped_counted_and_stop_the_run(tmp_path, tiny_data):
    run_dir = make(tmp_path, tiny_data)
    assert train_in_process(run_dir, poison, 3, 4) == 0
    skips = [e for e in read_events(run_dir) if e["event"] == "skipped_step"]
    assert [(e["step"], e["cursor"], e["in_a_row"]) for e in skips] == [(3, 8, 1), (4, 12, 2)]
    assert [m["step"] for m in read_metrics(run_dir) if m.get("skipped")] == [3, 4]

    run_dir = make(tmp_path, tiny_data, "stopped", train={"max_nonfinite_steps": 3})
    assert train_in_process(run_dir, poison, 5, 99) == 1
    end = read_events(run_dir)[-1]
    assert (end["status"], end["step"]) == ("FAILED", 7)
    assert "3 steps in a row" in end["reason"]
    assert json.loads((manifest.folder(run_dir, 4) / "manifest.json").read_text())["step"] == 4


def test_spike_rolls_back_and_leaves_out_the_batches_between(tmp_path, tiny_data):
    spike = {"window": 8, "action": "rollback"}
    run_dir = make(tmp_path, tiny_data, train={"steps": 14, "spike": spike}, checkpoint={"every": 5})
    assert train_in_process(run_dir, raise_loss, 12) == 0
    events = read_events(run_dir)
    back = next(e for e in events if e["event"] == "rollback")
    assert (back["from_step"], back["to_step"], back["cursor"], back["left_out"]) == (12, 10, 48, [40, 48])
    steps = [m for m in read_metrics(run_dir) if "loss" in m]
    assert [m["step"] for m in steps] == list(range(1, 15))
    assert steps[-1]["sequences"] == 48 + 4 * 4


def test_stop_while_running_from_outside(tmp_path, tiny_data):
    run_dir = make(tmp_path, tiny_data, train={"steps": 100000}, checkpoint={"every": 0})

    def stop_after_a_few_steps():
        while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir)) < 3:
            time.sleep(0.05)
        (run_dir / "stop").touch()

    thread = threading.Thread(target=stop_after_a_few_steps)
    thread.start()
    assert train_in_process(run_dir) == 75
    thread.join()
    assert manifest.committed(run_dir)[-1] == read_metrics(run_dir)[-1]["step"]
