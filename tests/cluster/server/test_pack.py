"""What `muster submit` sends of the user's folder."""

import json
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from cluster.server import pack
from configs import ConfigError


@pytest.fixture
def folder(tmp_path):
    for name, text in {
        ".gitignore": "*.bin\n/data/\n", "moe.yaml": "train: {}", "models/mine.py": "x = 1", "big.bin": "0" * 9000,
        "data/tokens": "1", "models/.gitignore": "scratch.py\n", "models/scratch.py": "", "scratch.py": "y = 2",
        ".rayignore": "notes.txt\n", "notes.txt": "", "runs/a/config.yaml": "", ".git/HEAD": "", ".venv/bin/python": "",
        "models/__pycache__/mine.pyc": "",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_what_gitignore_names_stays_at_home(folder):
    found = [str(path) for path in pack.files(folder, [folder / "runs", Path("/elsewhere")])]
    assert found == [".gitignore", ".rayignore", "models/.gitignore", "models/mine.py", "moe.yaml", "scratch.py"]


def test_too_much_names_the_largest(folder):
    packed = pack.files(folder)
    pack.check_size(folder, packed)
    (folder / "weights.pt").write_bytes(b"0" * 5000)
    (folder / "small.pt").write_bytes(b"0" * 2000)
    with pytest.raises(ConfigError) as error:
        pack.check_size(folder, pack.files(folder), limit=6000)
    words = str(error.value)
    assert words.index("weights.pt (5 kB)") < words.index("small.pt (2 kB)")
    assert ".gitignore" in words
    assert "the limit is 6 kB" in words


def test_all_of_it_lies_below_a_folder_of_a_name_that_is_no_module_of_ours(folder):
    target = folder.parent / "job.zip"
    pack.write_zip(target, folder, pack.files(folder), json.dumps({"do": "submit"}))
    with zipfile.ZipFile(target) as archive:
        assert json.loads(archive.read("message.json")) == {"do": "submit"}
        assert archive.read("work/models/mine.py") == b"x = 1"
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"message.json", "work"}


SENT = {
    "name": "moe", "run_dir": "/shared/moe", "command": "muster train moe", "workers": 1, "most": 1, "cpus": 1.0,
    "gpus": 0, "group": 1, "priority": 0,
}  # fmt: skip


def zipped(message, *names):
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("message.json", message if isinstance(message, str) else json.dumps(message))
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), "content")
    return file.getvalue()


SUBMIT = {"do": "submit", "id": "job-moe-3f9a1c", "job": SENT}


def test_our_own_message_is_read():
    assert pack.read_message(zipped(SUBMIT, "work/", "work/moe.yaml", "work/a/..b")).model_dump() == SUBMIT


@pytest.mark.parametrize(
    "name", ["../up", "work/../../up", "/etc/up", "work\\..\\up", "elsewhere", "work/../message.json"]
)
def test_a_file_elsewhere_is_refused(name):
    with pytest.raises(pack.BadMessage, match="outside of work/"):
        pack.read_message(zipped(SUBMIT, name))


@pytest.mark.parametrize("id", ["../../up", "/etc/up", "..", ".", "", "a/b", "a\nb", "-x", "x" * 256])
def test_an_id_that_is_no_name_of_a_file_is_refused(id):
    with pytest.raises(pack.BadMessage, match=r"id: .* is not the id of a job"):
        pack.read_message(zipped(SUBMIT | {"id": id}))


@pytest.mark.parametrize(
    "content",
    [
        b"no zip",
        zipped("{"),
        zipped("[1]"),
        zipped({}),
        zipped({"do": "exec", "id": "job-a"}),
        zipped(SUBMIT | {"now": True}),
        zipped({"do": "stop", "id": "job-a", "now": True}),
        zipped(SUBMIT | {"job": {key: value for key, value in SENT.items() if key != "workers"}}),
        zipped(SUBMIT | {"job": SENT | {"cpus": "all"}}),
        zipped(SUBMIT)[:-30],
    ],
)
def test_what_is_no_message_is_refused(content):
    with pytest.raises(pack.BadMessage):
        pack.read_message(content)


def test_ray_unpacks_nothing_outside(tmp_path):
    """What reaches Ray's job API past the queue."""
    from ray._private.runtime_env.packaging import unzip_package

    (tmp_path / "evil.zip").write_bytes(zipped(SUBMIT, "../up", "work/../../up", str(tmp_path / "abs"), "work/in"))
    unzip_package(str(tmp_path / "evil.zip"), str(tmp_path / "there"), False, False)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["evil.zip", "there/message.json", "there/work/in"]
