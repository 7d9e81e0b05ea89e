"""Write hashes/*.txt, which the images install: the versions of constraints.txt, with the SHA-256 of each file.

    python deploy/lock.py       # after a change of constraints.txt; needs uv, and PyPI

They hold on every platform and for every Python from 3.11 on. Packages that constraints.txt does not list, such as
CUDA's libraries, which only Linux has, keep the version that is in the file until it no longer fits.
"""

import re
import subprocess
from pathlib import Path

DEPLOY = Path(__file__).parent
HASHES = DEPLOY / "hashes"
COMPILE = ("uv", "pip", "compile", "--quiet", "--no-config", "--universal", "--python-version=3.11",
           "--generate-hashes", "--no-header", "--no-annotate", "-c", DEPLOY / "constraints.txt")  # fmt: skip
OF_TORCH = re.compile(r"torch|triton|nvidia-.+|cuda-.+")
"""PyPI's torch and the packages that only it needs: the CPU build of torch is on another index."""


def names(file: Path) -> list[str]:
    """The packages that a requirements file pins."""
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
