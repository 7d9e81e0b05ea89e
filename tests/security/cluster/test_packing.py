"""What `muster submit` never takes along: secrets, what links lead to elsewhere, what is no file. And it ends."""

import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.server import pack
from cluster.server.ignore import ignored_by
from cluster.server.secret_files import is_secret
from configs import ConfigError
from trainer.tracking.artifacts import Artifacts

SECRETS = (
    ".env", ".env.local", "deploy/prod.env", ".netrc", ".git-credentials", ".ssh/id_ed25519", ".ssh/config",
    ".aws/credentials", ".kube/config", ".docker/config.json", ".pypirc", ".npmrc", ".config/gcloud/credentials.db",
    ".azure/accessTokens.json", ".huggingface/token", ".cache/huggingface/token", "tls/server.pem", "tls/server.key",
    "id_rsa", "id_rsa.bak", "keys/store.p12", "wandb/settings", ".muster/queue/x.zip", ".ray/auth_token", ".ENV",
    "token", "hf_token", "notes/.token", "my.token", ".secret", "secret", "secrets", "password.txt", "passwords.txt",
    "api_key", "openai-api-key.txt", ".hf_token", ".openai_api_key", ".credentials", "aws_credentials", ".env/nested/x",
    "new_user_credentials.csv", "accessKeys.csv", "rootkey.csv", "credentials (1).json", "my-service-account.json",
    ".kaggle.json", "auth.json", "pgpass.conf", ".mylogin.cnf", "rclone.conf", "prod.tfvars", ".terraformrc",
    "kube.config", "admin.kubeconfig", "admin.conf", "krb5.keytab", "secring.gpg", "htpasswd", ".vault_pass",
    ".m2/settings.xml", ".mc/config.json", ".bash_history", "ssh_host_ed25519_key", "deploy_key", ".env.md", "#.env#",
    "id_rsa (copy)", "copy of .env", "x.pem.1", "server.key.gpg", "key.pem.gz", ".netrc (2)", ".env ",
    ".env~", "..env.swp", "kaggle.json", ".streamlit/secrets.toml", ".pgpass", "service-account-prod.json",
)  # fmt: skip
PLAIN = (
    ".env.example", "moe.yaml", "models/secrets.py", "id_rsa.pub", ".docker/Dockerfile", "keys.csv", "environment.yml",
    "tokens/tokenizer.json", ".gitignore", "docs/credentials.md", "model.safetensors", "monkey.txt",
    "tokens.py", "secrets/__init__.py", "tokenizer_config.json", "special_tokens_map.json", "tokens.csv", "tokens.json",
    "train_history.json", "loss_history", "password_test.go", "secretary.txt", "token_counts.csv", "settings.xml",
    "weights.1", "report (1).pdf", "auth.py", "max_tokens.txt", "docs/api_key.html", ".env.template",
)  # fmt: skip


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# content of {name}")
    return folder


def packed(folder: Path, *insisted: str) -> set[str]:
    return {path.as_posix() for path in pack.files(folder, insisted=insisted)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path / "user")
    return tmp_path / "user"


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_stays_at_home_and_is_named(folder, capsys, name):
    fill(folder, name, "moe.yaml")
    assert packed(folder) == {"moe.yaml"}
    told = capsys.readouterr().err
    assert f" {name} (secrets: --with FILE sends one)" in told
    assert len(told.splitlines()) == 1


def test_what_is_no_secret_is_sent_without_a_word(folder, capsys):
    assert packed(fill(folder, *PLAIN)) == set(PLAIN)
    assert capsys.readouterr().err == ""


KEY = "-----BEGIN {}PRIVATE KEY-----{}b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAA"


@pytest.mark.parametrize(
    "content",
    [
        KEY.format("", "\n"), KEY.format("OPENSSH ", "\r\n"), "# mine\n" + KEY.format("RSA ", "\n"),
        '{"private_key": "' + KEY.format("", "\\n") + '"}', "id = AKIA" + "Q7" * 8, "token: hf_" + "aB" * 17,
        "ghp_" + "a1" * 18, "OPENAI=sk-proj-" + "aB-_" * 20, "x" * 60_000 + " hf_" + "aB" * 17 + "\n" + "y" * 10**6,
    ],
    ids=lambda content: content[:24],
)  # fmt: skip
@pytest.mark.parametrize("name", ["github", "id_rsa.py", "notes.md", "key.pem.txt"])
def test_a_secret_is_known_by_its_content(folder, capsys, name, content):
    fill(folder, name, "moe.yaml")
    (folder / name).write_text(content)
    assert packed(folder) == {"moe.yaml"}
    assert f" {name} (secrets: --with FILE sends one)" in capsys.readouterr().err
    assert packed(folder, name) == {"moe.yaml", name}


@pytest.mark.parametrize(
    "content",
    [
        "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQ", "if b'PRIVATE KEY-----' in content:", "hf_transfer", "hf_"
        + "a" * 20, "AKIA", "the sk-learn way", "task-" + "a" * 60, "sk-" + "a" * 20, "hf_" + "a" * 60,
        "xAKIA" + "Q" * 16,
    ],
)  # fmt: skip
def test_what_only_looks_like_a_secret_is_sent(folder, content):
    fill(folder, "notes")
    (folder / "notes").write_text(content)
    assert packed(folder) == {"notes"}


def test_nothing_of_this_repository_is_taken_for_a_secret(capsys):
    root = Path(__file__).parents[3]
    listed = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    tracked = {name for name in listed.stdout.split("\0") if name and (root / name).exists()}
    assert tracked - {path.as_posix() for path in pack.files(root)} == set()


def test_who_insists_gets_it(folder, capsys):
    fill(folder, ".env", ".netrc", "big.bin", ".gitignore")
    (folder / ".gitignore").write_text("*.bin\n")
    assert packed(folder, ".env", "big.bin") == {".env", ".gitignore", "big.bin"}
    assert ".env" not in capsys.readouterr().err
    for wrong in ("missing", "../user2", "/etc/passwd", "."):
        with pytest.raises(ConfigError, match="--with"):
            packed(folder, wrong)


def test_the_token_stays_at_home_wherever_it_is(folder, monkeypatch):
    token = "f" * 64
    fill(folder, "moe.yaml", "sub/my-cluster", "notes.sh")
    (folder / "sub" / "my-cluster").write_text(token + "\n")
    (folder / "notes.sh").write_text(f"export RAY_AUTH_TOKEN={token}\n")
    assert "notes.sh" in packed(folder)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "sub" / "my-cluster"))
    assert packed(folder) == {"moe.yaml"}
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    assert packed(folder) == {"moe.yaml"}


def test_links_that_lead_out_are_named_and_not_followed(folder, capsys):
    fill(folder, "moe.yaml", "data/ignored", ".git/config", ".gitignore", ".env")
    (folder / ".gitignore").write_text("/data/\n")
    fill(folder.parent, "outside/secret", "user2/x")
    for name, target in {
        "out": "../outside", "file": "../outside/secret", "abs": "/etc/passwd", "near": "../user2/x",
        "git": ".git/config", "ignored": "data/ignored", "plain": ".env",
        "nowhere": "missing", "loop": "loop", "twice": "out",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    assert packed(folder) == {"moe.yaml", ".gitignore"}
    told = capsys.readouterr().err
    for name in ("out", "file", "abs", "near", "git", "ignored", "plain", "nowhere", "loop", "twice"):
        assert f" {name}" in told


def test_links_inside_are_files_in_the_jobs_copy(folder, tmp_path):
    fill(folder, "models/v3/weights", "models/v3/config.yaml", "tools/run.sh")
    (folder / "models" / "latest").symlink_to("v3")
    (folder / "current").symlink_to(folder / "models" / "latest")
    (folder / "go").symlink_to("tools/run.sh")
    (folder / "tools" / "run.sh").chmod(0o775)
    pack.write_zip(tmp_path / "job.zip", folder, pack.files(folder), "{}")
    from ray._private.runtime_env.packaging import unzip_package

    before = os.umask(0o077)
    try:
        unzip_package(str(tmp_path / "job.zip"), str(tmp_path / "there"), False, False)
    finally:
        os.umask(before)
    work = tmp_path / "there" / "work"
    for name in ("models/v3/weights", "models/latest/weights", "current/weights"):
        assert (work / name).read_text() == "# content of models/v3/weights"
    assert not [path for path in work.rglob("*") if path.is_symlink()]
    modes = {path.relative_to(work).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in work.rglob("*")}
    assert (modes["tools/run.sh"], modes["go"], modes["current/weights"], modes["models"]) == (
        0o700,
        0o700,
        0o600,
        0o700,
    )
    assert not [name for name, mode in modes.items() if mode & 0o077]
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        assert not [entry.filename for entry in archive.infolist() if entry.external_attr >> 16 & 0o077]


HOSTILE = """
import os, sys
from pathlib import Path
from cluster.server import pack
from configs import ConfigError
folder = Path(sys.argv[1])
os.symlink(".", folder / "self")
os.symlink("..", folder / "a" / "up")
os.symlink(folder, folder / "a" / "absolute")
os.mkfifo(folder / "pipe")
os.mkfifo(folder / ".rayignore")
print(sorted(map(str, pack.files(folder))))
for i in range(40):
    (folder / f"d{i}").mkdir()
    for name in ("x", "y"):
        os.symlink(f"../d{i + 1}", folder / f"d{i}" / name)
(folder / "d40").mkdir()
try:
    pack.files(folder)
except ConfigError as error:
    print("refused:", "files to send, counted through its links" in str(error))
"""


def test_packing_ends_whatever_the_links_and_pipes(folder):
    fill(folder, "moe.yaml", "a/b")
    command = [sys.executable, "-c", HOSTILE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert done.stdout.splitlines() == ["['a/b', 'moe.yaml']", "refused: True"], done.stderr
    assert "pipe" in done.stderr


PATTERNS = """
import sys
from pathlib import Path
from cluster.server import pack
folder = Path(sys.argv[1])
for name in ("a" * 40, "a" * 250, "a/" * 60 + "a", "ba" * 100, "[" * 200):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
(folder / ".gitignore").write_text("\\n".join([
    "a*" * 13 + "b", "*a" * 6 + "b", "**/a/" * 8 + "b", "a/**/" * 8 + "b", "?*" * 20 + "b", "[ab]*" * 20 + "c",
    "*[!b]" * 9 + "b", "***a" * 9 + "b", "*?" * 50 + "b",
    r"*\\[" * 20 + "b", "**/*a*a*a*a/**/*a*a*a*a/b", "**/" * 200 + "b",
]))
print(len(pack.files(folder)))
"""


def test_no_pattern_makes_packing_long(folder):
    command = [sys.executable, "-c", PATTERNS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3])
    assert done.stdout == "6\n", done.stderr


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    pattern=st.lists(
        st.sampled_from(["*", "a", "b", "?", "/", "**", "/**/", "[ab]", "\\*", "[]a]", "[^]a]", "x.", "[a"])
    ),
    path=st.lists(st.sampled_from(["a", "b", "x.", "*", "]", "^", "/", "aa"]), min_size=1),
)
def test_patterns_mean_what_they_do_to_ray(pattern, path):
    from ray._private.runtime_env.packaging import _get_excludes

    name = "/".join(part for part in "".join(path).split("/") if part) or "a"
    rays = _get_excludes(Path("/folder"), ["".join(pattern)])(Path("/folder") / name)
    assert ignored_by(Path("/folder"), ["".join(pattern)])(Path("/folder") / name) == bool(rays)


def test_the_last_pattern_of_a_file_holds(folder):
    fill(folder, "a.bin", "keep.bin", "sub/keep.bin")
    (folder / ".gitignore").write_text("# all\n*.bin\n!keep.bin\n\n/sub/keep.bin\n")
    assert packed(folder) == {".gitignore", "keep.bin"}


@pytest.mark.parametrize("content", [b"[z-a]\n", b"a\n" * 40_000, b"\xff", b"\x00[9-0]"])
def test_a_bad_ignore_file_is_one_message(folder, content):
    (folder / ".gitignore").write_bytes(content)
    with pytest.raises(ConfigError, match=r"\.gitignore cannot be read: "):
        packed(folder)


def test_what_became_a_pipe_or_a_link_meanwhile_is_not_read(folder, tmp_path):
    fill(folder, "moe.yaml", "a")
    fill(folder.parent, "secret")
    found = pack.files(folder)
    for change in (lambda path: os.mkfifo(path), lambda path: os.symlink("../secret", path)):
        (folder / "a").unlink()
        change(folder / "a")
        with pytest.raises(ConfigError, match="a was changed"):
            pack.write_zip(tmp_path / "job.zip", folder, found, "{}")


@pytest.mark.parametrize("name", [b"bad\xff", b"back\\slash"])
def test_a_name_that_no_zip_takes_is_one_message(folder, name):
    (folder / os.fsdecode(name)).touch()
    with pytest.raises(ConfigError, match="has a name that cannot be sent"):
        pack.files(folder)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(sorted(SECRETS)),
    below=st.lists(st.text("abcXYZ-_.0", min_size=1, max_size=8).filter(lambda text: text.strip(".")), max_size=3),
    upper=st.booleans(),
    ending=st.sampled_from(["", "~", ".bak", ".orig", ".old"]),
)
def test_a_secret_is_one_in_any_folder_case_and_copy(name, below, upper, ending):
    path = "/".join((*below, name + ending))
    assert is_secret(Path(path.upper() if upper else path))


def test_mlflow_gets_no_file_that_a_link_leads_to(tmp_path):
    run_dir = fill(tmp_path / "run", "config.yaml", "samples/a.txt")
    fill(tmp_path, "home/key")
    (run_dir / "samples" / "link.txt").symlink_to(tmp_path / "home" / "key")
    (run_dir / "samples" / "folder").symlink_to(tmp_path / "home")
    (run_dir / "plots").symlink_to(tmp_path / "home")
    (run_dir / "metrics.jsonl").symlink_to(tmp_path / "home" / "key")
    os.mkfifo(run_dir / "samples" / "pipe")
    sent = []

    class Tracker:
        def artifact(self, path, folder):
            sent.append(f"{folder}/{path.name}")

    Artifacts(run_dir, Tracker(), (), lambda: None).send(("config.yaml", "samples", "plots", "metrics.jsonl"))
    assert sent == ["/config.yaml", "samples/a.txt"]
