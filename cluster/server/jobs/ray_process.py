"""The process beside the cluster's server that is connected to Ray: it does what it is told, line by line.

Whoever is connected to Ray is ended by Ray when the head is lost, and may wait for it for minutes. So the server is
not: this process is, and `ray_link` starts another when it is gone.

    python -P -m cluster.server.jobs.ray_process HOST:PORT PARENT

Reads a JSON object a line, `{"do": name, ...}`, and answers each with one: `{"ok": ...}`, `{"error": text}`, or
`{"away": text}` where Ray does not answer. The first that it writes says whether it is connected.
"""

import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cluster.gangs.access_token import refuse_open
from configs import private_files
from configs.reading.parse import clip
from trainer.processes.orphans import end_with

from .job_queue import read_package

LONGEST_MESSAGE = 1 << 16
"""Characters of what Ray says of a job."""


class RayProcess:
    """What may be asked for, by the names of the methods.

    Raises:
        ConfigError: the cluster is open to everyone.
        Exception: of gRPC, Ray and its HTTP clients, whatever listens there.
    """

    def __init__(self, address: str) -> None:
        import ray

        from cluster.gangs import ray_private

        for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        if not (dashboard := ray_private.dashboard()):
            raise RuntimeError("Ray's dashboard, which its job API is part of, has not started, or is off")
        self.url = f"http://{dashboard}"
        refuse_open(self.url)
        self.client = ray_private.job_api(self.url)

    def hello(self) -> dict[str, Any]:
        """Where things are: Ray's session folder, URL of its dashboard."""
        from cluster.gangs import ray_private

        return {"logs": str(ray_private.session_folder() / "logs"), "dashboard": self.url}

    def known(self) -> list[str]:
        """Ids of all jobs that were started by Ray's job API."""
        return [job.submission_id for job in self.client.list_jobs() if job.submission_id]

    def look(self, jobs: list[str], places: bool) -> dict[str, Any]:
        """The machines, and how jobs stand.

        Args:
            places: also by which drivers they are used.
        """
        from cluster.gangs.ray_nodes import machines

        found: dict[str, Any] = {"jobs": {id: self._job(id) for id in jobs}, "places": None}
        if places:
            found["places"] = self._places()
        # After the places: what is placed in between counts twice then, as starting and as taken, and never as free.
        found["machines"] = [
            {"id": each.id, "name": each.name, "address": each.address, "free": each.free, "total": each.total}
            for each in machines()
        ]
        return found

    def _job(self, id: str) -> dict[str, Any]:
        from cluster.gangs.ray_private import JobApiError

        try:
            info = self.client.get_job_info(id)
            driver = info.driver_info
            return {
                "status": info.status.value,
                "ended": bool(info.status.is_terminal()),
                "exit_code": info.driver_exit_code,
                "message": (info.message or "")[-LONGEST_MESSAGE:],
                "driver": driver.id if driver else None,
            }
        except JobApiError as error:
            return {"gone": True} if error.status == 404 else {"silent": True}
        except OSError:  # the job API does not answer now
            return {"silent": True}
        except Exception as error:  # Ray checks nothing of what it is told
            return {"wrong": f"{type(error).__name__}: {clip(error)}"}

    def _places(self) -> list[dict[str, Any]]:
        """Each placement group that stands: its driver, and what it reserves of which machine."""
        from ray.util.state import list_placement_groups

        groups = list_placement_groups(
            address=self.url,
            filters=[("state", "=", "CREATED")],
            detail=True,
            limit=10_000,
            raise_on_missing_output=False,
        )
        return [
            {
                "driver": group.creator_job_id,
                "bundles": [
                    [bundle.get("node_id"), (bundle.get("unit_resources") or {}).get("CPU", 0.0),
                     (bundle.get("unit_resources") or {}).get("GPU", 0.0)]
                    for bundle in group.bundles or []
                ],
            }
            for group in groups
        ]  # fmt: skip

    def start(self, id: str, package: str, sha256: str, **job: Any) -> None:
        """Start a job, whose package is checked once more as it is read. Nothing is done where it was started."""
        from cluster.gangs import ray_private

        # A name for each job: of one that it knows Ray would run what lies unpacked already, whoever changed it.
        name = f"gcs://{id}.zip"
        try:
            ray_private.put(name, read_package(Path(package), id, sha256))
            runtime = {"working_dir": name, "env_vars": job.pop("environment")}
            self.client.submit_job(submission_id=id, runtime_env=runtime, **job)
        except Exception as error:
            if "already exists" not in str(error):
                ray_private.delete(name.encode())
                raise

    def stop(self, id: str) -> None:
        """SIGTERM to a job's driver, once; SIGKILL after the time that the job's environment says."""
        self.client.stop_job(id)

    def signal(self, id: str) -> None:
        """One more SIGTERM to a job's driver, which Ray runs on the head as it does this process."""
        import ray

        info = self.client.get_job_info(id)
        driver = info.driver_info
        if driver and driver.node_ip_address == ray.util.get_node_ip_address() and not info.status.is_terminal():
            with contextlib.suppress(ProcessLookupError, PermissionError, ValueError):
                os.kill(int(driver.pid), signal.SIGTERM)

    def ask(self, gangs: list[tuple[int, float, float]]) -> None:
        """Tell Ray's autoscaler what must fit: workers, CPUs and GPUs of each, by gang."""
        from ray.autoscaler.sdk import request_resources

        bundles = []
        for workers, cpus, gpus in gangs:
            bundles += [{"CPU": cpus} | ({"GPU": gpus} if gpus else {})] * workers
        request_resources(bundles=bundles)


ASKED = ("hello", "known", "look", "start", "stop", "signal", "ask")


def reply(process: RayProcess, asked: dict[str, Any]) -> dict[str, Any]:
    """What is answered to a request."""
    from ray.exceptions import RayError

    assert asked["do"] in ASKED
    try:
        return {"ok": getattr(process, asked.pop("do"))(**asked)}
    except (OSError, RayError) as error:
        return {"away": clip(error) or type(error).__name__}
    except Exception as error:
        return {"error": clip(error) or type(error).__name__}


def main() -> None:
    """Answer until the input ends."""
    address, parent = sys.argv[1:]
    end_with(int(parent))
    private_files()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which ends this process
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever Ray prints is no answer

        def answer(said: dict[str, Any]) -> None:
            answers.write(json.dumps(said) + "\n")
            answers.flush()

        try:
            process = RayProcess(address)
        except Exception as error:
            answer({"away": clip(error) or type(error).__name__})
            return
        answer(reply(process, {"do": "hello"}))
        for line in sys.stdin:
            answer(reply(process, json.loads(line)))


if __name__ == "__main__":
    main()
