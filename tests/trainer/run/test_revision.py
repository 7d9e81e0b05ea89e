"""The git commit that a run was started from is found where there is one, and nothing fails where there is none."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from cluster.server import pack
from trainer.run import revision


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "moe.yaml").write_text("train: {}")
    git(folder, "add", "moe.yaml")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_commit_and_whether_a_tracked_file_differs(repository):
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "runs").mkdir()
    (repository / "runs" / "new.txt").write_text("new")
    assert revision.of(repository) == revision.of(repository / "runs") == {"git_commit": commit, "git_dirty": False}
    (repository / "moe.yaml").write_text("train: {steps: 1}")
    assert revision.of(repository) == {"git_commit": commit, "git_dirty": True}


def test_a_folder_packed_for_a_cluster_knows_its_commit(repository, tmp_path):
    said = revision.of(repository)
    target = tmp_path / "job.zip"
    pack.write_zip(target, repository, pack.files(repository), "{}")
    with zipfile.ZipFile(target) as archive:
        archive.extractall(tmp_path / "job")
    assert not (tmp_path / "job" / "work" / ".git").exists()
    assert revision.of(tmp_path / "job" / "work") == said
    assert json.loads((tmp_path / "job" / "work" / revision.SENT).read_text()) == said


def test_folders_without_a_commit(tmp_path, monkeypatch):
    assert revision.of(tmp_path) == {}
    assert revision.of(tmp_path / "missing") == {}
    git(tmp_path, "init", "-q")
    assert revision.of(tmp_path) == {}, "no commit yet"
    (tmp_path / revision.SENT).write_text("[1]")
    assert revision.of(tmp_path) == {}, "not what was packed"


def test_without_git(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision.of(repository) == {}


def test_a_git_that_does_not_answer(repository, tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(revision, "TIMEOUT", 0.2)
    assert revision.of(repository) == {}
