"""Stand-ins for Slurm's commands and for muster: small programs on the PATH, for a dry run of a batch script."""

import sys
from pathlib import Path

SRUN = """#!{python}
import os, sys
arguments = sys.argv[1:]
options = [arguments.pop(0) for _ in list(arguments) if arguments and arguments[0].startswith("--")]
with open({log!r}, "a") as file:
    print({{"srun": options}}, file=file)
os.environ["SLURM_CPUS_ON_NODE"] = "2"
os.execvp(arguments[0], arguments)
"""
SCONTROL = """#!{python}
import sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("n1", "n2", sep="\\n")
else:
    with open({log!r}, "a") as file:
        print({{"scontrol": sys.argv[1:]}}, file=file)
"""
PYTHON = """#!{python}
import sys
assert sys.flags.safe_path, "modules of the working directory would run"
if sys.argv[1] == "-c":
    print("127.0.0.1 lo")
else:  # how many machines the cluster has
    print(1 if {lost} else open({log!r}).read().count("['cluster', "))
"""
MUSTER = """#!{python}
import os, signal, socket, sys, time
with open({log!r}, "a") as file:
    seen = {{name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_ADDRESS", "GLOO_SOCKET_IFNAME")}}
    print({{"muster": sys.argv[1:], **seen}}, file=file)
if sys.argv[1] == "train":
    def stopped(*_):
        print("stopped with a checkpoint", flush=True)
        sys.exit({code})
    signal.signal(signal.SIGTERM, stopped)
    print("training", flush=True)
    time.sleep({seconds})
    sys.exit({code})
if sys.argv[2] == "up":
    with open(os.environ["RAY_AUTH_TOKEN_PATH"], "w") as file:
        file.write("token")
    port = next(each.partition("=")[2] for each in sys.argv if each.startswith("--port="))
    server = socket.create_server(("127.0.0.1", int(port)))
time.sleep(0 if sys.argv[2] == "join" and {lost} else 60)
"""


def write_stand_ins(folder: Path, code: int, seconds: float, lost: bool = False) -> Path:
    """Put `srun`, `scontrol`, `python3` and `muster` into a folder.

    Args:
        lost: `muster cluster join` ends at once.
        code: exit code of `muster train`, on its own after `seconds` or on SIGTERM.

    Returns:
        The file to which each of them appends a line when called.
    """
    log = folder / "calls"
    values = {"python": sys.executable, "log": str(log), "code": code, "seconds": seconds, "lost": lost}
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python3", PYTHON), ("muster", MUSTER)):
        (folder / name).write_text(text.format(**values))
        (folder / name).chmod(0o755)
    return log
