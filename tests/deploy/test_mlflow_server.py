"""MLflow's server as deploy/kubernetes starts it, on a real PostgreSQL and an S3 server, and a run that ships to it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from trainer.record.lines import read_metrics

ROOT = Path(__file__).parents[2]
PASSWORD = "p@ss/word:1"  # what a URI would have to quote
S3_SERVER = "moto[s3]==5.2.5"  # on the flask that MLflow brings
MAKE_BUCKET_AND_USER = """if True:
    import boto3, json, os, sys
    from urllib.request import Request, urlopen
    here = dict(endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"], region_name="us-east-1",
                aws_access_key_id="root", aws_secret_access_key="root")
    boto3.client("s3", **here).create_bucket(Bucket="mlflow")
    iam = boto3.client("iam", **here)
    iam.create_user(UserName="mlflow")
    iam.put_user_policy(UserName="mlflow", PolicyName="mlflow", PolicyDocument=open(sys.argv[1]).read())
    key = iam.create_access_key(UserName="mlflow")["AccessKey"]
    now_ask_everyone = Request(here["endpoint_url"] + "/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
    urlopen(now_ask_everyone).close()
    print(json.dumps([key["AccessKeyId"], key["SecretAccessKey"]]))
    """
READ_FROM_STORE = """if True:
    import boto3, os, sys
    s3 = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    sys.stdout.buffer.write(s3.get_object(Bucket="mlflow", Key=sys.argv[1])["Body"].read())
    """
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def postgres_programs() -> Path:
    found = shutil.which("initdb")
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found and not newest:
        pytest.skip("PostgreSQL's initdb is not installed (Debian: apt-get install postgresql)")
    return newest[-1].parent if newest else Path(found).resolve().parent


def installed(folder: Path, *requirements: str) -> str:
    """Install into a folder of its own. Returns the folder, for PYTHONPATH."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(requirements)}: {done.stderr[-300:]}")
    return str(folder)


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)


@contextmanager
def postgres() -> Iterator[int]:
    """A PostgreSQL of its own, whose user `mlflow` needs the password. Yields its port."""
    programs, port = postgres_programs(), free_port()
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="mlpg-", dir="/tmp") as folder:  # its socket wants a short path
        secret = Path(folder) / "password"
        secret.write_text(PASSWORD)
        if user:
            for path in (folder, secret):
                shutil.chown(path, user)

        def run(program: str, *arguments: str) -> None:
            command = [programs / program, "-D", f"{folder}/data", *arguments]
            subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=120)

        run("initdb", "-U", "mlflow", f"--pwfile={secret}", "--auth=scram-sha-256")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}"
        try:
            run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", options, "start")
            create = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
            subprocess.run(create, env=os.environ | {"PGPASSWORD": PASSWORD}, check=True, timeout=60)
            yield port
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path, health: str) -> Iterator[None]:
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_for(health, process, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, dict[str, str]]]:
    """URI of MLflow, and the environment of its process."""
    folder = tmp_path_factory.mktemp("server")
    requirements = (ROOT / "deploy" / "mlflow" / "requirements.txt").read_text().splitlines()
    clients = installed(
        folder / "clients", "-c", f"{ROOT}/deploy/constraints.txt", *(line for line in requirements if "==" in line)
    )
    documents = yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "tracking" / "mlflow.yaml").read_text())
    (pod,) = [each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Deployment"]
    (container,) = pod["containers"]
    port, s3 = free_port(), f"http://127.0.0.1:{free_port()}"
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "AWS_", "PG"))}
    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        given = {
            "MLFLOW_BACKEND_STORE_URI": f"@127.0.0.1:{database}/mlflow", "PGPASSWORD": PASSWORD,
            "MLFLOW_S3_ENDPOINT_URL": s3, "HOME": str(folder),
        }  # fmt: skip
        environment = plain | {"PYTHONPATH": clients}
        for variable in container["env"]:
            name, value = variable["name"], variable.get("value", "")
            environment[name] = value.partition("@")[0] * ("@" in value) + given.get(name, value)
        moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", s3.rpartition(":")[2]]
        other = plain | {"PYTHONPATH": installed(folder / "s3", S3_SERVER), "INITIAL_NO_AUTH_ACTION_COUNT": "1000000"}
        stack.enter_context(started(moto, other, folder / "s3.log", f"{s3}/moto-api/"))
        # The user that the init container makes in MinIO, with the same policy.
        make = [sys.executable, "-c", MAKE_BUCKET_AND_USER, ROOT / "deploy/kubernetes/tracking/policy.json"]
        made = subprocess.run(make, env=environment, timeout=120, capture_output=True)
        assert made.returncode == 0, made.stderr
        environment |= dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), json.loads(made.stdout), strict=True))
        changed = {"--host": "--host=127.0.0.1", "--port": f"--port={port}"}
        arguments = [changed.get(each.partition("=")[0], each) for each in container["args"]]
        command = [sys.executable, "-m", *container["command"], *arguments]
        log = folder / "mlflow.log"
        stack.enter_context(started(command, environment, log, f"http://127.0.0.1:{port}/health"))
        yield f"http://127.0.0.1:{port}", environment


def test_a_run_is_shown_whole(server, tiny_data, tmp_path, monkeypatch):
    uri, environment_of_server = server
    # As a client that cannot reach the store: the signed links, which moto does not know, end in an error.
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    (tmp_path / "run.yaml").write_text(f"""
run: {{name: shown, root: {tmp_path}}}
model: {{num_layers: 2, hidden_size: 32, num_heads: 2, num_experts: 4, expert_size: 32}}
train: {{steps: 30, global_batch: 4, seq_len: 32, precision: fp32, eval_every: 10, eval_sequences: 4}}
data: {{path: {tiny_data}}}
tracking: {{uri: "{uri}", experiment: deployed}}
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--master-port", str(free_port())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    # Every file counts as large: what the client would write to the store itself.
    done = subprocess.run(
        [*command, "-m", "trainer", "run.yaml"],
        cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT), "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("deployed")
    assert experiment.artifact_location.startswith("mlflow-artifacts:/")  # the store's keys stay with the server
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    recorded = [record for record in read_metrics(tmp_path / "shown") if "loss" in record]
    assert [record["step"] for record in recorded] == list(range(1, 31))
    points = sorted(client.get_metric_history(run.info.run_id, "loss"), key=lambda point: point.step)
    assert [(point.step, point.value) for point in points] == [(each["step"], each["loss"]) for each in recorded]

    for name in ("metrics.jsonl", "config.yaml", "model/model.safetensors"):
        through = client.download_artifacts(run.info.run_id, name, str(tmp_path))
        assert Path(through).read_bytes() == (tmp_path / "shown" / name).read_bytes()
    key = f"{experiment.experiment_id}/{run.info.run_id}/artifacts/config.yaml"
    stored = [sys.executable, "-c", READ_FROM_STORE, key]
    read = subprocess.run(stored, env=environment_of_server, capture_output=True, timeout=120)
    assert read.stdout == (tmp_path / "shown" / "config.yaml").read_bytes(), read.stderr


def test_its_keys_open_its_bucket_alone(server):
    _, environment = server
    for code in ("create_bucket(Bucket='other')", "list_buckets()", "delete_bucket(Bucket='mlflow')"):
        script = f"import boto3, os; boto3.client('s3', endpoint_url=os.environ['MLFLOW_S3_ENDPOINT_URL']).{code}"
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
        )
        assert "AccessDenied" in done.stderr, (code, done.stderr)


def test_a_foreign_name_is_refused(server):
    uri, _ = server
    url = f"{uri}/api/2.0/mlflow/experiments/search?max_results=1"
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.status == 200
    request = urllib.request.Request(url, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 403
