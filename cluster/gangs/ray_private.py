"""Every name of Ray 2.60 that it does not document: they stand nowhere else. Each is looked up when it is used.

What they are names of may change with any release, which is why pyproject.toml pins Ray below the next minor one. This
module imports Ray, which takes half a second and looks at the environment: it is imported where it is needed.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import ray
from ray._private import node, services
from ray.experimental import internal_kv


class JobApiError(RuntimeError):
    """A job API's answer that is an error.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"Request failed with status code {status}: {text}.")
        self.status = status


class Lean(node.Node):
    """A private Ray with nothing that one machine has no use for: the dashboard's server, the autoscaler and the log
    monitor, each of which imports Ray anew."""

    def start_api_server(self, **options: Any) -> None:
        """The dashboard is off; what Ray starts all the same reports usage, which is off too."""

    def start_monitor(self) -> None:
        """It asks for more machines."""

    def start_log_monitor(self) -> None:
        """It copies the workers' output to the driver, which reads it from the run's folder."""


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Have `ray.init` start such a Ray while the block runs, each process in a session of its own.

    A signal to this process's group (`timeout`, a scheduler, systemd, a closed terminal) would otherwise end the GCS
    before a run has written its checkpoint. The processes still end with this one, as Ray asks the kernel for that.
    """
    apart = functools.partial(services.ConsolePopen, start_new_session=True)
    with patch.object(node, "Node", Lean), patch.object(services, "ConsolePopen", apart):
        yield


def files_in(folder: Path) -> dict[str, Any]:
    """What `ray.init` is told for its files to lie in a folder."""
    return {"_temp_dir": str(folder)}


def silence_errors() -> None:
    """Print no prose about every lost worker, in colour: the supervisor records the same in one line."""
    ray._private.worker.listen_error_messages = lambda worker, threads_stopped: None


def session_folder() -> Path:
    """Where the Ray that this process has joined keeps its files on this machine."""
    return Path(_joined().get_session_dir_path())


def dashboard() -> str | None:
    """`host:port` of the dashboard of the Ray that this process has joined."""
    return _joined().address_info.get("webui_url")


def _joined() -> Any:
    return ray._private.worker.global_worker.node


def address_on_this_machine() -> str:
    """Of the one Ray among this machine's processes. Raises OSError or ValueError: there is none, or several."""
    return str(services.canonicalize_bootstrap_address_or_die("auto"))


def job_api(url: str) -> Any:
    """Ray's client of a cluster's job API, which raises JobApiError where Ray's own raises RuntimeError with a text."""
    from ray.job_submission import JobSubmissionClient  # much that no other command needs

    class Client(JobSubmissionClient):
        def _raise_error(self, r: Any) -> NoReturn:
            raise JobApiError(r.status_code, r.text)

    return Client(url)


def free_resources() -> dict[str, dict[str, float]]:
    """What is free on each living machine, by its id."""
    return ray._private.state.available_resources_per_node()


def draining_nodes() -> dict[str, int]:
    """Machines that will go, by id, with the Unix time in ms until which they stay; 0: unknown."""
    return dict(ray._private.state.state.get_draining_nodes())


def put(name: str, content: bytes) -> None:
    """Keep something in the memory of the cluster's head."""
    internal_kv._internal_kv_put(name, content)


def delete(name: bytes) -> None:
    internal_kv._internal_kv_del(name)


def pattern_to_regex(pattern: str) -> tuple[str | None, bool]:
    """(a regular expression of the paths that a line of .gitignore is about, whether it leaves them out), as Ray packs.

    Raises ValueError, IndexError, OverflowError or re.error.
    """
    from ray._private.thirdparty.pathspec.patterns.gitwildmatch import GitWildMatchPattern

    return GitWildMatchPattern.pattern_to_regex(pattern)
