"""The images, their pinned versions, and the commands of the README."""

import re

import pytest
from manifests import DEPLOY, KUBERNETES, ROOT, SECRET, documents, muster_command, pins

from configs import load
from configs.sweep.definition import load_sweep


@pytest.mark.parametrize("file", ["Dockerfile", "mlflow.Dockerfile", "minio.Dockerfile"])
def test_dockerfile(file):
    text = re.sub(r"\\\n", " ", (DEPLOY / "docker" / file).read_text())
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    arguments = dict(line[1].split("=", 1) for line in lines if line[0] == "ARG")
    stages: dict[str, list[list[str]]] = {}
    for line in lines:
        if line[0] == "FROM":
            stages[line[3] if len(line) > 2 else "last"] = [line]
        elif stages:
            list(stages.values())[-1].append(line)
    for stage in stages.values():
        base = stage[0][1].replace("${PYTHON}", arguments["PYTHON"])
        assert base in stages or re.fullmatch(r"[a-z./]+:[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?", base), base
    ends = [stages[name] for name in ("cpu", "cuda")] if file == "Dockerfile" else [stages["last"]]
    for stage in ends:
        assert [line[1] for line in stage if line[0] == "USER"] == ["1000:1000"]
        (copied,) = [line for line in stage if line[0] == "COPY" and line[1].startswith("--from=")]
        assert copied[1].removeprefix("--from=") in stages
    for line in lines:
        if line[0] == "COPY" and not line[1].startswith("--from="):
            assert all((ROOT / source).exists() for source in line[1:-1]), line
        if line[0] == "RUN" and "install" in line and "pip" in " ".join(line):
            # Held to digests, or what has none of PyPI's: torch for CPUs, and muster itself.
            for command in " ".join(line).replace("--disable-pip-version-check", "").split(" pip install ")[1:]:
                assert re.search(r"--require-hashes -r|-c constraints\.txt .*(torch|\.)( |$)", command), command
                assert "--no-deps" in command
        assert line[0] not in ("ENV", "ARG") or not SECRET.search(" ".join(line)), line


def test_images_have_the_pinned_versions():
    (tag,) = [each["newTag"] for each in documents(KUBERNETES / "tracking" / "kustomization.yaml")[0]["images"]]
    assert tag == pins()["mlflow"]
    requirements = (DEPLOY / "mlflow" / "requirements.txt").read_text().splitlines()
    assert [line for line in requirements if "==" not in line and not line.startswith("#")] == ["mlflow"]


def test_readme_commands_are_musters(tmp_path):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("isoflop: {budgets: [1e18]}")
    text = (DEPLOY / "README.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    ours = [line for line in lines if line.startswith("muster ")]
    assert ours
    for line in ours:
        params = muster_command(line)
        if "config" in params:
            load(params["config"], params["overrides"] or ())
        elif "file" in params:
            load_sweep(sweep, params["overrides"] or ())
    for line in lines:
        for path in re.findall(r"(?:-k|-f|--project-directory) (deploy/\S+)", line):
            assert (ROOT / path).exists(), line
