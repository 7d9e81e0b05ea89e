"""Reach a cluster's job API and its queue, from anywhere that the API is reachable."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cluster.gangs.access_token import Address, in_environment, is_open, refuse_open, remember, use_token, within
from cluster.gangs.session import check_reachable, found_by_ray
from cluster.gangs.share import Node
from configs import ConfigError, mask
from configs.reading.parse import clip, shortened
from configs.units import byte_size
from trainer.files.scratch import temporary_folder

from .dispatch import MESSAGES, READY
from .messages import Known, Message
from .pack import LIMIT, write_zip
from .waiting import fold, refusals

T = TypeVar("T")
QUEUE = "muster-queue-"
CONNECTING = 30.0
"""Seconds that Ray's client may take to find out whom it talks to."""
PATIENCE = 90.0
"""Seconds a queue may take to start and answer."""


class Cluster:
    """A cluster's job API.

    Raises:
        ConfigError: nothing answers, it is open to everyone, or it refuses the token.
    """

    def __init__(self, address: Address) -> None:
        url = address.where
        use_token(address)
        try:
            refuse_open(url)
        except OSError as error:
            raise _silent(url, error) from None
        # Ray takes half a second to import, and looks at the environment when it is.
        from ray.exceptions import AuthenticationError

        from cluster.gangs.ray_private import job_api, read_token_again

        for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        read_token_again()
        self.url = url
        self._queue: str | None = None
        self._sent = ""
        """Name of the last message."""
        try:
            self.jobs_api = within(CONNECTING, lambda: job_api(url))
        except AuthenticationError:
            raise ConfigError(
                f"the cluster at {mask(url)} refuses the token: copy the one of its head to here, or name its file in "
                f"RAY_AUTH_TOKEN_PATH"
            ) from None
        except Exception as error:  # some ten kinds, whatever else listens there
            raise _silent(url, error) from None
        remember(url, url.removeprefix("http://"))

    def nodes(self) -> list[Node]:
        """What each machine has. Raises ConfigError if what answers does not say."""
        from ray.util.state import list_nodes

        try:
            for _ in range(20):  # a new head knows none for a moment
                # Ray counts dead machines too, and takes those left out for an answer cut short.
                found = list_nodes(
                    address=self.url,
                    detail=True,
                    filters=[("state", "=", "ALIVE")],
                    limit=10_000,
                    raise_on_missing_output=False,
                )
                if found:
                    break
                time.sleep(0.5)
            sizes = [node.resources_total or {} for node in found]
            return [Node(float(size.get("CPU", 0)), float(size.get("GPU", 0))) for size in sizes]
        except Exception as error:  # Ray checks nothing of what it is told
            raise _silent(self.url, error) from None

    def jobs(self) -> dict[str, Known]:
        """All jobs of the queue by id, oldest first. Starts the queue if it does not run."""
        return fold(self._said())

    def _said(self) -> list[str]:
        """The lines that the queue has printed: its journal, and what it refused."""
        try:
            if self._queue is None or self.jobs_api.get_job_status(self._queue).is_terminal():
                self._queue = self._running_queue()
            return str(self.jobs_api.get_job_logs(self._queue)).splitlines()
        except ConfigError:
            raise
        except (OSError, ValueError, TypeError, KeyError) as error:  # what answers is no job API, or no more
            raise _silent(self.url, error) from None

    def send(self, message: Message) -> None:
        """Leave the queue a message without files."""
        with temporary_folder() as folder:
            path = folder / "message.zip"
            write_zip(path, folder, [], message.model_dump_json())
            self.send_file(path)

    def send_file(self, path: Path) -> None:
        """Leave the queue a message. Ray keeps it for ten minutes, the queue takes it within one.

        Raises:
            ConfigError: it is larger than what the queue takes.
        """
        if (size := path.stat().st_size) > LIMIT:
            raise ConfigError(f"what is to be sent has {byte_size(size)} and the limit is {byte_size(LIMIT)}")
        self._sent = f"{MESSAGES}{time.time_ns()}-{os.getpid()}.zip"
        self.jobs_api._upload_package(f"gcs://{self._sent}", str(path), include_gitignore=False, is_file=True)

    def wait_for(self, id: str, seen: Callable[[Known], object]) -> Known:
        """The job that the last message was about, once `seen(job)` is true.

        Raises:
            ConfigError: the queue refused the message.
            RuntimeError: the queue does not answer.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            said = self._said()
            if reason := refusals(said).get(self._sent):
                raise ConfigError(f"the queue of {self.url} refused it: {reason}")
            if (job := fold(said).get(id)) and seen(job):
                return job
            time.sleep(0.3)
        raise self._no_answer()

    def _running_queue(self) -> str:
        """Id of the queue's own Ray job, started where none runs, once it has read its journal."""
        number, id, started, refused = 1, f"{QUEUE}1", False, ""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            status = self._status(id)
            if status is None:
                self._start_queue(id)
                started = True
            elif status.is_terminal():
                if started:  # just now: perhaps the queue of a head before has yet to end
                    said = str(self.jobs_api.get_job_logs(id)).splitlines()
                    refused = next((line for line in reversed(said) if line.startswith("muster: ")), "")
                    time.sleep(1)
                number += 1
                id = f"{QUEUE}{number}"
            elif READY in self.jobs_api.get_job_logs(id).splitlines():
                return id
            else:
                time.sleep(0.3)
        if refused:
            raise ConfigError(f"the queue of {self.url} does not start: {refused.removeprefix('muster: ')}")
        self._queue = id
        raise self._no_answer()

    def _status(self, id: str) -> Any:
        """Ray's status of a job; None: there is none."""
        return self._unless_missing(lambda: self.jobs_api.get_job_status(id))

    def output(self, id: str) -> str | None:
        """What a job's driver has printed; None: it has not started, or on a cluster that is gone."""
        return self._unless_missing(lambda: str(self.jobs_api.get_job_logs(id)))

    def _unless_missing(self, ask: Callable[[], T]) -> T | None:
        from cluster.gangs.ray_private import JobApiError

        try:
            return ask()
        except JobApiError as error:
            if error.status == 404:
                return None
            raise

    def _start_queue(self, id: str) -> None:
        try:
            # Started again whatever ends it, but not when it says itself that it cannot run.
            loop = "until muster cluster queue; do [ $? = 2 ] && exit 2; sleep 1; done"
            self.jobs_api.submit_job(submission_id=id, entrypoint=loop)
        except RuntimeError as error:
            if "already exists" not in str(error):  # someone else was quicker
                raise

    def _no_answer(self) -> RuntimeError:
        tail = self.jobs_api.get_job_logs(self._queue)[-2000:] if self._queue else ""
        return RuntimeError(f"the queue of {mask(self.url)} did not answer in {PATIENCE:.0f} s\n{tail}")


def api_url(address: str | None, from_config: Address | None = None) -> Address:
    """The job API of the cluster that is named: an http address, Ray's host:port, or `auto`.

    Args:
        address: as on the command line; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, `from_config`.

    Raises:
        ConfigError: none is named, nothing answers there, or the token is not for it.
    """
    named = Address(address, "command") if address else in_environment("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    given = named or from_config
    if given is None:
        raise ConfigError(
            "no cluster is named: --address http://HOST:8265, RAY_API_SERVER_ADDRESS, RAY_ADDRESS or cluster.address; "
            "`muster cluster up` starts one"
        )
    _check_address(given.where)
    if given.where.startswith(("http://", "https://")):
        return given._replace(where=given.where.rstrip("/"))
    given = found_by_ray(given)
    if ":" not in (where := given.where):
        raise ConfigError(f"{where} has no port: --address http://{where}:8265, or {where}:6379 (the head's)")
    use_token(given)
    try:
        check_reachable(given.where)
        if _answers(f"http://{given.where}"):
            return given._replace(where=f"http://{given.where}")
        from cluster.gangs.ray_private import dashboard_url

        url = dashboard_url(given.where)
        remember(given.where)
        return Address(url, "environment")  # the head's word; its loopback may be somebody else's on this machine
    except Exception as error:  # of gRPC and Ray, whatever listens there
        raise _silent(given.where, error) from None


def _check_address(where: str) -> None:
    """Raise ConfigError for what is no address, before a token for it is looked for."""
    try:
        parts = urlsplit(where if "//" in where else f"//{where}")
        wrong = "" if parts.hostname else "names no host"
        if parts.port == 0:
            wrong = "has port 0"
    except ValueError as error:  # a port above 65,535, or half an IPv6 address
        wrong = f"is none ({error})"
    if wrong:
        raise ConfigError(f"the cluster's address {shortened(mask(where))} {wrong}: --address http://HOST:8265")


def _answers(url: str) -> bool:
    try:
        is_open(url)
    except OSError:
        return False
    return True


def _silent(where: str, error: Exception) -> ConfigError:
    reason = clip(error, 200) or type(error).__name__
    return ConfigError(f"no job API of Ray answers at {mask(where)} ({reason}): --address names it, http://HOST:8265")
