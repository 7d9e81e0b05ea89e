"""The commit of a folder and whether it is changed are told without running what the folder's .git names."""

import os
import stat
import subprocess
import time
from pathlib import Path

import pytest
from no_hang import ends
from second_user import let_in, needs_second_user

from trainer.run import revision

WHO = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
ALLOW = ["-c", "protocol.file.allow=always"]


def git(folder: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", *WHO, *ALLOW, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return done.stdout.strip()


def commit(folder: Path, *options: str, text: str = "train: {}\n") -> Path:
    folder.mkdir(exist_ok=True)
    git(folder, "init", "-q", *options)
    (folder / "moe.yaml").write_text(text)
    git(folder, "add", "moe.yaml")
    git(folder, "commit", "-q", "-m", "first")
    return folder


@pytest.fixture
def repository(tmp_path):
    return commit(tmp_path / "repository")


@pytest.fixture
def trap(tmp_path):
    """A program that says that it ran, and passes its input on."""
    program = tmp_path / "trap"
    program.write_text(f"#!/bin/sh\necho ran >> {tmp_path / 'ran'}\nexec cat\n")
    program.chmod(0o755)
    return program


def ran(trap: Path) -> bool:
    return trap.with_name("ran").exists()


def touch(file: Path) -> None:
    """As after an editor that saved the same content: git must look into the file to know."""
    later = time.time() + 5
    os.utime(file, (later, later))


def head(folder: Path, changed: bool) -> dict[str, object]:
    return {"git_commit": git(folder, "rev-parse", "HEAD"), "git_dirty": changed}


@pytest.mark.parametrize("key", ["clean", "process"])
def test_no_filter_of_the_folder(repository, trap, key):
    (repository / ".gitattributes").write_text("* filter=evil\n")
    git(repository, "config", f"filter.evil.{key}", str(trap))
    said = head(repository, changed=False)
    touch(repository / "moe.yaml")
    assert revision.of(repository) == said
    (repository / "moe.yaml").write_text("train: []\n")
    assert revision.of(repository) == said | {"git_dirty": True}
    assert not ran(trap)
    subprocess.run(["git", "status"], cwd=repository, capture_output=True, stdin=subprocess.DEVNULL, timeout=20)
    assert ran(trap), "the trap is none"


CONFIGS = [
    "core.fsmonitor", "core.pager", "pager.status", "core.sshCommand", "diff.external", "diff.evil.textconv",
    "core.editor", "core.alternateRefsCommand", "alias.status", "alias.rev-parse", "uploadpack.packObjectsHook",
    "credential.helper", "core.askPass", "gpg.program", "core.gitProxy",
]  # fmt: skip


def test_no_program_of_the_folders_configuration(repository, trap):
    (repository / ".gitattributes").write_text("* diff=evil\n")
    for key in CONFIGS:
        git(repository, "config", key, f"!{trap}" if key.startswith("alias") else str(trap))
    said = {"git_commit": (repository / ".git/refs/heads" / branch(repository)).read_text().strip()}
    trap.with_name("ran").unlink(missing_ok=True)  # by the fixtures' own git
    touch(repository / "moe.yaml")
    assert revision.of(repository) == said | {"git_dirty": False}
    assert not ran(trap)
    subprocess.run(["git", "status"], cwd=repository, capture_output=True, stdin=subprocess.DEVNULL, timeout=20)
    assert ran(trap), "the trap is none"


def branch(repository: Path) -> str:
    return (repository / ".git/HEAD").read_text().strip().rpartition("/")[2]


def test_no_hook(repository, trap):
    said = head(repository, changed=False)
    for hook in ("post-index-change", "reference-transaction", "fsmonitor-watchman"):
        (repository / ".git/hooks" / hook).write_text(trap.read_text())
        (repository / ".git/hooks" / hook).chmod(0o755)
    touch(repository / "moe.yaml")
    assert revision.of(repository) == said
    assert not ran(trap)


def test_no_filter_of_a_submodule(repository, tmp_path, trap):
    git(repository, "submodule", "add", "-q", str(commit(tmp_path / "other")), "sub")
    git(repository, "commit", "-q", "-m", "sub")
    inside = repository / "sub"
    (inside / ".gitattributes").write_text("* filter=evil\n")
    git(inside, "config", "filter.evil.clean", str(trap))
    said = head(repository, changed=False)
    touch(inside / "moe.yaml")
    assert revision.of(repository) == said
    assert not ran(trap)
    git(inside, "commit", "-q", "--allow-empty", "-m", "more")
    assert revision.of(repository) == said | {"git_dirty": True}, "another commit of it is a change"


def test_nothing_is_fetched(tmp_path, trap):
    """In a partial clone git fetches what it lacks, by a command of the configuration."""
    origin = commit(tmp_path / "origin")
    git(origin, "config", "uploadpack.allowFilter", "true")
    trap.write_text(trap.read_text().replace("exec cat", "exit 1"))
    partial = tmp_path / "partial"
    git(tmp_path, "clone", "-q", "--no-checkout", "--filter=tree:0", origin.as_uri(), str(partial))
    git(partial, "config", "remote.origin.uploadpack", str(trap))
    git(partial, "config", "protocol.file.allow", "always")
    assert revision.of(partial) == {"git_commit": git(origin, "rev-parse", "HEAD")}
    assert not ran(trap)
    subprocess.run(["git", "status"], cwd=partial, capture_output=True, stdin=subprocess.DEVNULL, timeout=20)
    assert ran(trap), "the trap is none"


def test_no_git_of_the_folder(repository, trap, monkeypatch):
    said = head(repository, changed=False)
    (repository / "git").write_text(trap.read_text())
    (repository / "git").chmod(0o755)
    monkeypatch.chdir(repository)
    for first in (".", "", "./"):
        monkeypatch.setenv("PATH", f"{first}:{os.environ['PATH']}")
        assert revision.of(repository) == said
    assert not ran(trap)


def test_the_environment_names_no_other_repository(repository, tmp_path, monkeypatch):
    other = commit(tmp_path / "other", text="other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    assert revision.of(repository) == head(repository, changed=False)


@needs_second_user
def test_the_users_own_configuration_says_whom_to_trust(repository, trap, monkeypatch):
    said = head(repository, changed=False)
    (repository / ".gitattributes").write_text("* filter=evil\n")
    git(repository, "config", "filter.evil.clean", str(trap))
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 65534, 65534)
    touch(repository / "moe.yaml")
    assert revision.of(repository) == {}
    for key, value in {"COUNT": "1", "KEY_0": "safe.directory", "VALUE_0": "*"}.items():
        monkeypatch.setenv(f"GIT_CONFIG_{key}", value)
    assert revision.of(repository) == said
    assert not ran(trap)


def test_a_folder_that_looks_like_a_bare_repository(repository, tmp_path):
    git(tmp_path, "clone", "-q", "--bare", str(repository), "bare")
    assert revision.of(tmp_path / "bare") == {}


@needs_second_user
def test_another_users_repository_is_not_asked(repository):
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 65534, 65534)
    assert revision.of(let_in(repository)) == {}


def changed_in_the_index(folder: Path) -> None:
    (folder / "moe.yaml").write_text("train: {steps: 1}\n")
    git(folder, "add", "moe.yaml")
    (folder / "moe.yaml").write_text("train: {}\n")


CHANGES = {
    "nothing": (lambda folder: (folder / "new").write_text("new"), False),
    "same content": (lambda folder: touch(folder / "moe.yaml"), False),
    "content of the same size": (lambda folder: (folder / "moe.yaml").write_text("train: []\n"), True),
    "in the index alone": (changed_in_the_index, True),
    "gone": (lambda folder: (folder / "moe.yaml").unlink(), True),
    "may be run": (lambda folder: (folder / "moe.yaml").chmod(stat.S_IRWXU), True),
}


@pytest.mark.parametrize(("change", "told"), CHANGES.values(), ids=CHANGES.keys())
def test_what_is_a_change(repository, change, told):
    change(repository)
    assert revision.of(repository) == head(repository, changed=told)


KINDS = {
    "sha256": ["--object-format=sha256"],
    "branch": ["--initial-branch=some/branch"],
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_kinds_of_repositories(tmp_path, options):
    folder = commit(tmp_path / "folder", *options)
    assert revision.of(folder) == head(folder, changed=False)
    (folder / "moe.yaml").write_text("other")
    assert revision.of(folder) == head(folder, changed=True)


def test_a_work_tree_alternates_packed_refs_and_a_split_index(repository, tmp_path):
    git(tmp_path, "clone", "-q", "--shared", str(repository), "clone")
    git(tmp_path / "clone", "worktree", "add", "-q", str(tmp_path / "tree"))
    git(repository, "pack-refs", "--all")
    git(repository, "gc", "-q")
    git(repository, "update-index", "--split-index")
    for folder in (tmp_path / "clone", tmp_path / "tree", repository):
        assert revision.of(folder) == head(folder, changed=False)
        (folder / "moe.yaml").write_text("other")
        assert revision.of(folder) == head(folder, changed=True)


def test_settings_of_the_file_system_count(repository):
    said = head(repository, changed=False)
    git(repository, "config", "core.fileMode", "false")
    (repository / "moe.yaml").chmod(0o755)
    assert revision.of(repository) == said
    git(repository, "config", "core.autocrlf", "true")
    (repository / "moe.yaml").write_bytes(b"train: {}\r\n")
    git(repository, "add", "moe.yaml")
    touch(repository / "moe.yaml")
    assert revision.of(repository) == said


SENT = ['{"git_commit": "\\u001b]52;c;aGk=\\u0007"}', "[" * 100_000, '{"git_commit": {}}', "{}" * 10**6]


@pytest.mark.parametrize("text", SENT, ids=range(len(SENT)))
def test_a_commit_that_was_not_sent_by_us(tmp_path, text):
    (tmp_path / revision.SENT).write_text(text)
    assert revision.of(tmp_path) == {}


def test_a_pipe_in_the_place_of_what_was_sent(tmp_path):
    os.mkfifo(tmp_path / revision.SENT)
    assert revision.of(tmp_path) == {}


@pytest.mark.parametrize("name", ["HEAD", "index", "config", "included"])
def test_a_pipe_in_a_repository_is_not_waited_for(repository, tmp_path, name):
    path = repository / ".git" / name if name != "included" else tmp_path / "pipe"
    if name == "included":
        git(repository, "config", "include.path", str(path))
    else:
        path.unlink()
    os.mkfifo(path)
    with ends():
        found = revision.of(repository)
    assert found == ({"git_commit": found["git_commit"]} if name == "index" else {})
