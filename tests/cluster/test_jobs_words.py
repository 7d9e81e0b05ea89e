"""What is said of a job, with a cluster of one that is written out; a real one is in test_jobs.py."""

from types import SimpleNamespace

import pytest

from cluster import jobs
from configs import ConfigError


def cluster(**job):
    elastic = {"state": "FINISHED", "workers": 1, "most": 3, "cpus": 2.0, "gpus": 0.0}
    return SimpleNamespace(jobs=lambda: {"job-a": elastic | job})


def test_an_elastic_job_has_ranks_up_to_the_most(tmp_path):
    """Of attempts the newest by its number: the hundredth is after the ninety-ninth."""
    (tmp_path / "logs").mkdir()
    for attempt in ("01", "99", "100"):
        (tmp_path / "logs" / f"attempt-{attempt}-rank-0002.log").write_text(attempt)
    found = cluster(run_dir=str(tmp_path))
    assert list(jobs._rank_output(found, "job-a", 2, follow=False)) == ["100"]
    with pytest.raises(ConfigError, match="ranks 0 to 2"):
        list(jobs._rank_output(found, "job-a", 3, follow=False))


def test_a_gang_in_words():
    [elastic] = cluster().jobs().values()
    assert jobs._gang(elastic) == "1 to 3 x (2 CPU)"
    assert jobs._gang(elastic | {"most": 1, "gpus": 1.0}) == "1 x (2 CPU, 1 GPU)"
    of_before = {key: value for key, value in elastic.items() if key != "most"}
    assert jobs._gang(of_before) == "1 x (2 CPU)"
