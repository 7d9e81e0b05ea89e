"""The child process of a cluster's server that is connected to Ray, and executes requests one by one.

Ray ends a process that is connected to it when the head is lost, and its calls may block for minutes. So the server
itself is not connected; this process is, and `ray_link` replaces it when it is gone.

    python -P -m cluster.server.jobs.ray_process HOST:PORT PARENT

Reads requests from stdin, a JSON object per line, `{"do": name, ...}`, and answers each with one line: `{"ok": ...}`,
`{"error": text}`, or `{"away": text}` if Ray does not answer. The first line that it writes says whether it connected.
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
"""Most characters of Ray's message about a job that are passed on."""


class RayProcess:
    """A connection to Ray; each public method is a request.

    Raises:
        ConfigError: the cluster asks nobody for a token.
        Exception: whatever gRPC, Ray or its HTTP client raise, depending on what listens there.
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
        """Folder of the drivers' output, and URL of Ray's dashboard."""
        from cluster.gangs import ray_private

        return {"logs": str(ray_private.session_folder() / "logs"), "dashboard": self.url}

    def known(self) -> list[str]:
        """Ids of all jobs that Ray's job API knows."""
        return [job.submission_id for job in self.client.list_jobs() if job.submission_id]

    def look(self, jobs: list[str], places: bool) -> dict[str, Any]:
        """The machines, and the status of jobs.

        Args:
            places: also list the placement groups.
        """
        from cluster.gangs.ray_nodes import machines

        found: dict[str, Any] = {"jobs": {id: self._job(id) for id in jobs}, "places": None}
        if places:
            found["places"] = self._places()
        # After the placement groups: one that is created in between then counts twice, and never as free.
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
        """Each placement group that was created: its driver, and what it reserves on which machine."""
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
        """Start a job, after its package was checked once more. Does nothing if it was started already."""
        from cluster.gangs import ray_private

        # A name per job: under a known name Ray would run what is unpacked already, even if somebody changed it.
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
        """Let Ray send SIGTERM to a job, once, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S."""
        self.client.stop_job(id)

    def signal(self, id: str) -> None:
        """Send another SIGTERM to a job's driver, which runs on the head like this process."""
        import ray

        info = self.client.get_job_info(id)
        driver = info.driver_info
        if driver and driver.node_ip_address == ray.util.get_node_ip_address() and not info.status.is_terminal():
            with contextlib.suppress(ProcessLookupError, PermissionError, ValueError):
                os.kill(int(driver.pid), signal.SIGTERM)

    def ask(self, gangs: list[tuple[int, float, float]]) -> None:
        """Ask Ray's autoscaler for room for these gangs: (workers, CPUs and GPUs of each worker)."""
        from ray.autoscaler.sdk import request_resources

        bundles = []
        for workers, cpus, gpus in gangs:
            bundles += [{"CPU": cpus} | ({"GPU": gpus} if gpus else {})] * workers
        request_resources(bundles=bundles)


ASKED = ("hello", "known", "look", "start", "stop", "signal", "ask")


def reply(process: RayProcess, asked: dict[str, Any]) -> dict[str, Any]:
    """Execute a request. Returns the answer."""
    from ray.exceptions import RayError

    assert asked["do"] in ASKED
    try:
        return {"ok": getattr(process, asked.pop("do"))(**asked)}
    except (OSError, RayError) as error:
        return {"away": clip(error) or type(error).__name__}
    except Exception as error:
        return {"error": clip(error) or type(error).__name__}


def main() -> None:
    """Execute requests until stdin ends."""
    address, parent = sys.argv[1:]
    end_with(int(parent))
    private_files()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, and the server this process
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # so that what Ray prints is not taken for an answer

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
