"""A run's page where the run counts something other than tokens, and where its time takes long to work out."""

from dashboards import serving, write_run

from cluster.server.web.pages import details
from trainer.record.lines import Record


def test_a_run_that_counts_images(tmp_path):
    record = Record(tmp_path / "run", 1)
    (tmp_path / "run" / "config.yaml").write_text("task: classification\nmodel: {family: convnet}\n")
    record.event("attempt_started", world_size=1, device="cpu")
    record.event("plan", parameters=1234, flops_per_example=50.0)
    for step in (1, 2, 3):
        record.metrics(
            {"step": step, "loss": 1 / step, "images": 4 * step, "examples": 4 * step, "images_per_second": 64}
        )
    scores = {"eval_images": 9, "eval_accuracy": 0.75, "eval_accuracy_ema": 0.8, "eval_share": [0.5]}
    record.metrics({"step": 3, "eval_loss": 0.5} | scores)
    record.close()
    with serving([tmp_path]) as server:
        row = server.rows()["run"]
        assert (row["task"], row["parameters"]) == ("classification", 1234)
        told = server.get("/api/runs/run").json
        assert (told["scores"], told["header"]["parameters"]) == ([["accuracy", 0.75]], 1234)
        line = server.get("/api/runs/run/series?metric=loss&x=flops").json["metrics"]["loss"]
        assert line["x"] == [200.0, 400.0, 600.0]


def test_where_the_time_of_a_long_run_went_is_told_later(tmp_path, monkeypatch):
    monkeypatch.setattr(details, "LARGE", 0)
    write_run(tmp_path / "run")
    with serving([tmp_path]) as server:
        server.look()
        told = server.get("/api/runs/run").json["goodput"]
        assert (told["later"], told["fraction"], told["parts"]) == (True, None, [])
        later = server.get("/api/runs/run/goodput").json
        assert (later["later"], len(later["by_attempt"])) == (False, 1)
        assert server.get("/api/runs/run").json["goodput"] == later
