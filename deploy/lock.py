"""Write hashes/*.txt, which the images install: versions of constraints.txt, with the SHA-256 of every file of each.

    python deploy/lock.py       # after a change of constraints.txt; needs uv, and PyPI

They hold on every platform and for every Python from 3.11 on. What constraints.txt leaves open, such as CUDA's
libraries, which only Linux has, keeps the version it has there until it no longer fits.
"""

import re
import subprocess
from pathlib import Path

DEPLOY = Path(__file__).parent
HASHES = DEPLOY / "hashes"
COMPILE = ("uv", "pip", "compile", "--quiet", "--no-config", "--universal", "--python-version=3.11",
           "--generate-hashes", "--no-header", "--no-annotate", "-c", DEPLOY / "constraints.txt")  # fmt: skip
OF_TORCH = re.compile(r"torch|triton|nvidia-.+|cuda-.+")
"""PyPI's torch and what only that brings along: another build of it, for CPUs, is on another index."""


def names(file: Path) -> list[str]:
    """The packages that a file of requirements pins."""
    return re.findall(r"^([A-Za-z0-9._-]+)==", file.read_text(), flags=re.MULTILINE)


def main() -> None:
    HASHES.mkdir(exist_ok=True)
    project, whole, cpu = DEPLOY.parent / "pyproject.toml", HASHES / "muster.txt", HASHES / "muster-cpu.txt"
    subprocess.run([*COMPILE, project, "-o", whole], check=True)
    left_out = [f"--no-emit-package={name}" for name in names(whole) if OF_TORCH.fullmatch(name)]
    subprocess.run([*COMPILE, *left_out, project, "-o", cpu], check=True)
    subprocess.run([*COMPILE, DEPLOY / "mlflow" / "requirements.txt", "-o", HASHES / "mlflow.txt"], check=True)


if __name__ == "__main__":
    main()
