"""What `muster submit` sends of the user's folder."""

import json
import zipfile
from pathlib import Path

import pytest

from cluster import pack
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
    assert words.index("weights.pt (4.9 KiB)") < words.index("small.pt (2.0 KiB)")
    assert ".gitignore" in words
    assert "the limit is 5.9 KiB" in words


def test_all_of_it_lies_below_a_folder_of_a_name_that_is_no_module_of_ours(folder):
    target = folder.parent / "job.zip"
    pack.write_zip(target, folder, pack.files(folder), json.dumps({"do": "submit"}))
    with zipfile.ZipFile(target) as archive:
        assert json.loads(archive.read("message.json")) == {"do": "submit"}
        assert archive.read("work/models/mine.py") == b"x = 1"
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"message.json", "work"}
