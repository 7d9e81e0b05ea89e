"""What deploy/ says to Kubernetes, to compose and to Docker, held against the programs it starts and against itself."""

import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from cluster.cli import app
from configs import load
from configs.sweep.definition import load_sweep

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.parent for path in (KUBERNETES / "overlays").glob("*/kustomization.yaml"))
POD_LISTS = ("containers", "initContainers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside Ray and MLflow
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY|MINIO_ROOT")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


SOURCES = {path.relative_to(KUBERNETES).as_posix(): documents(path) for path in sorted(KUBERNETES.rglob("*.yaml"))}
OBJECTS = {
    (document["kind"], document["metadata"]["name"]): document
    for name, found in SOURCES.items()
    if not name.endswith("kustomization.yaml")
    for document in found
}
CLUSTER = OBJECTS["RayCluster", "muster"]["spec"]
HEAD, WORKERS = CLUSTER["headGroupSpec"], CLUSTER["workerGroupSpecs"][0]


def walk(tree: Any) -> list[dict]:
    """Every mapping of a tree."""
    if isinstance(tree, list):
        return [found for each in tree for found in walk(each)]
    return [tree, *(found for each in tree.values() for found in walk(each))] if isinstance(tree, dict) else []


def pods(tree: Any) -> list[dict]:
    """Every pod's spec."""
    return [found for found in walk(tree) if isinstance(found.get("containers"), list)]


def containers(tree: Any) -> list[dict]:
    return [each for pod in pods(tree) for key in POD_LISTS for each in pod.get(key, [])]


def muster_command(line: str) -> dict[str, Any]:
    """Parse `muster ...` as the command line does. Returns its parameters."""
    program, *arguments = shlex.split(line.removeprefix("exec "), comments=True)
    assert program == "muster"
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    return command.make_context(command.name, arguments).params


def options(command: Any) -> set[str]:
    return {option for each in command.params for option in each.opts if option.startswith("--")}


@cache
def ray_commands() -> dict[str, Any]:
    from ray.scripts import scripts

    return scripts.cli.commands


@cache
def mlflow_server() -> Any:
    from mlflow.cli import server

    return server


def pins() -> dict[str, str]:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@cache
def built(overlay: Path) -> list[dict]:
    """What an overlay becomes."""
    kubectl, kustomize = shutil.which("kubectl"), shutil.which("kustomize")
    if not (kubectl or kustomize):
        pytest.skip("neither kubectl nor kustomize is installed")
    command = [kustomize, "build"] if kustomize else [kubectl, "kustomize"]
    done = subprocess.run([*command, str(overlay)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


# Kustomize.


def test_everything_is_found():
    assert {overlay.name for overlay in OVERLAYS} == {"cpu", "gpu", "job-cpu", "job-gpu"}
    kinds = [kind for kind, _ in OBJECTS]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "RayCluster": 1, "RayJob": 1, "PersistentVolumeClaim": 1, "NetworkPolicy": 4, "Service": 3, "Deployment": 1,
        "StatefulSet": 2,
    }  # fmt: skip


def test_kustomizations_name_what_is_there():
    named = set()
    for file in KUBERNETES.rglob("kustomization.yaml"):
        (kustomization,) = documents(file)
        for name in kustomization.get("resources", []) + kustomization.get("components", []):
            path = (file.parent / name).resolve()
            assert path.is_file() or (path / "kustomization.yaml").is_file(), f"{file}: {name}"
            named.add(path)
    kept = {path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert kept - named == set()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlay(overlay):
    objects = built(overlay)
    assert {each["metadata"]["namespace"] for each in objects} == {"muster"}
    kind = "RayJob" if overlay.name.startswith("job-") else "RayCluster"
    (found,) = [each for each in objects if each["kind"] in ("RayJob", "RayCluster")]
    assert found["kind"] == kind
    cluster = found["spec"].get("rayClusterSpec", found["spec"])
    device = "cuda" if overlay.name.endswith("gpu") else "cpu"
    images = {each["image"] for each in containers(cluster)}
    assert images == {f"registry.example.com/muster:0.1.0-{device}"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
    assert gpus == (8 if device == "cuda" else 0)
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "muster-ray-token"}
    if kind == "RayJob":
        params = muster_command(found["spec"]["entrypoint"])
        config = load(params["config"], params["overrides"])
        assert config.run.root == "/runs"
        assert config.parallel.world_size == workers["replicas"] * max(gpus, 1)
        assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]


def test_tracking_builds():
    assert len(built(KUBERNETES / "tracking")) == 9


# Ray.


def test_the_fields_are_kuberays():
    """Names as in the reference of ray.io/v1, KubeRay 1.6; the pods' own fields are Kubernetes'."""
    assert CLUSTER.keys() == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert HEAD.keys() == {"rayStartParams", "template"}
    assert WORKERS.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert OBJECTS["RayJob", "muster"]["spec"].keys() == {
        "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "entrypoint",
        "runtimeEnvYAML",
    }  # fmt: skip
    texts = [value for group in (HEAD, WORKERS) for value in group["rayStartParams"].values()]
    assert all(isinstance(value, str) for value in texts)


def test_ray_start_knows_the_parameters():
    for group in (HEAD, WORKERS):
        assert {f"--{name}" for name in group["rayStartParams"]} <= options(ray_commands()["start"])
    assert (HEAD["rayStartParams"]["num-cpus"], HEAD["rayStartParams"]["num-gpus"]) == ("0", "0")


def test_ray_is_the_pinned_one():
    assert CLUSTER["rayVersion"] == pins()["ray"]


def test_a_pod_that_ends_has_time_for_a_checkpoint():
    for group in (HEAD, WORKERS):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        text = container["lifecycle"]["preStop"]["exec"]["command"][2]
        (wait,) = re.findall(r"timeout (\d+) ", text)
        assert pod["terminationGracePeriodSeconds"] >= int(wait) + 30
        assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0
    drain = shlex.split(text.partition(";")[0])
    assert drain[:2] == ["ray", "drain-node"]
    given = ray_commands()["drain-node"].make_context("drain-node", drain[2:]).params
    assert given["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert given["deadline_remaining_seconds"] == int(wait)
    job = OBJECTS["RayJob", "muster"]["spec"]
    assert yaml.safe_load(job["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(int(wait))}}


def test_health_is_where_ray_answers_without_a_token():
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for group in (HEAD, WORKERS):
        (container,) = group["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["path"] in PUBLIC_EXACT_PATHS
            assert ports[container[probe]["httpGet"]["port"]] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


def test_runs_are_where_every_pod_reaches_them():
    claim = OBJECTS["PersistentVolumeClaim", "muster-runs"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (HEAD, WORKERS):
        pod = group["template"]["spec"]
        (volume,) = [each["name"] for each in pod["volumes"] if "persistentVolumeClaim" in each]
        mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        assert mounts[volume] == "/runs"
        assert mounts.keys() == {each["name"] for each in pod["volumes"]}


# Services, ports, policies.


def labelled(selector: dict) -> list[dict]:
    """Pod templates that a selector picks."""
    wanted = selector.get("matchLabels", {}).items()
    chosen = [each for each in walk(list(OBJECTS.values())) if "spec" in each and "containers" in each["spec"]]
    found = [each for each in chosen if wanted <= each["metadata"]["labels"].items()]
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        found = [each for each in found if each["metadata"]["labels"].get(rule["key"]) in rule["values"]]
    return found


def ports_of(templates: list[dict]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for each in containers(templates) for port in each.get("ports", [])}


@pytest.mark.parametrize("name", ["mlflow", "postgres", "minio"])
def test_service_leads_to_a_port_of_its_pod(name):
    spec = OBJECTS["Service", name]["spec"]
    templates = labelled({"matchLabels": spec["selector"]})
    assert len(templates) == 1
    (port,) = spec["ports"]
    assert ports_of(templates)[port["targetPort"]] == port["port"]
    for container in containers(templates):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "httpGet" in container.get(probe, {}):
                assert container[probe]["httpGet"]["port"] in ports_of(templates)


def test_addresses_are_services():
    places = {name: spec["spec"]["ports"][0]["port"] for (kind, name), spec in OBJECTS.items() if kind == "Service"}
    named = set()
    for container in containers(list(OBJECTS.values())):
        for variable in container.get("env", []):
            for host, port in re.findall(r"://(?:\w+@)?([a-z]+):(\d+)", variable.get("value", "")):
                assert places[host] == int(port)
                named.add(host)
    assert named == places.keys()


def test_policies_let_in_only_what_is_named():
    for name, count in (("ray", 2), ("mlflow", 1), ("mlflow-stores", 2)):
        spec = OBJECTS["NetworkPolicy", name]["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        chosen = labelled(spec["podSelector"])
        assert len(chosen) == count
        for rule in spec["ingress"]:
            assert all("podSelector" in peer for peer in rule["from"])
            for peer in rule["from"]:  # a pod of any namespace could carry the label
                assert peer.get("namespaceSelector") != {}
            for port in rule.get("ports", []):
                assert port["port"] in ports_of(chosen).values()
    among, outside = OBJECTS["NetworkPolicy", "ray"]["spec"]["ingress"]
    assert len(labelled(among["from"][0]["podSelector"])) == 2
    assert [port["port"] for port in outside["ports"]] == [8265]


def test_policies_let_out_what_a_pod_calls_and_nothing_else():
    """An address in a container's environment has a rule that leads to its pods, and each rule such an address."""
    called = {"ray": {"mlflow"}, "mlflow": {"postgres", "minio"}, "mlflow-stores": set()}
    for name, services in called.items():
        spec = OBJECTS["NetworkPolicy", name]["spec"]
        assert ("egress" in spec) is True
        reached = set()
        for rule in spec["egress"]:
            if rule.get("ports") == [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]:
                assert services
                continue
            (peer,) = rule["to"]
            (component,) = {each["metadata"]["labels"]["app.kubernetes.io/component"] for each in labelled(
                peer["podSelector"]
            )}  # fmt: skip
            if component == "ray" == name:
                continue
            (port,) = rule["ports"]
            assert port["port"] == OBJECTS["Service", component]["spec"]["ports"][0]["port"]
            reached.add(component)
        texts = [
            variable.get("value", "")
            for container in containers(labelled(spec["podSelector"]))
            for variable in container.get("env", [])
        ]
        named = {host for text in texts for host in re.findall(r"://(?:\w+@)?([a-z]+):\d+", text)}
        assert reached == services == named


# Secrets and rights.


def test_no_secret_is_written_down():
    assert [kind for kind, _ in OBJECTS if kind == "Secret"] == []
    variables = [each for container in containers(list(OBJECTS.values())) for each in container.get("env", [])]
    secrets = [each for each in variables if SECRET.search(each["name"]) and not each["name"].endswith("_FILE")]
    assert len(secrets) >= 5
    secrets += [each for each in variables if each["name"].startswith("PGPASS")]
    assert [each["name"] for each in secrets if "secretKeyRef" not in each.get("valueFrom", {})] == []
    for path in [*DEPLOY.rglob("*"), *(ROOT / "deploy" / "compose").glob(".*")]:
        if path.is_file():
            written = re.findall(r"://[^/\s:@]+:[^/\s@]+@", path.read_text())  # user:password@
            assert (path, written) == (path, [])


def test_pods_have_no_rights():
    found = pods(list(OBJECTS.values()))
    assert len(found) == 5
    for pod in found:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers([pod]):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"].keys() == {"requests", "limits"}


TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where Ray's autoscaler looks for its token."""


def test_the_autoscaler_alone_has_a_token_and_a_way_to_the_api_server():
    from ray.autoscaler._private.kuberay import node_provider

    assert Path(node_provider.IN_CLUSTER_TOKEN_PATH) == Path(TOKEN_FOLDER) / "token"
    for overlay in OVERLAYS:
        objects = built(overlay)
        (found,) = [each for each in objects if each["kind"] in ("RayJob", "RayCluster")]
        cluster = found["spec"].get("rayClusterSpec", found["spec"])
        pod = cluster["headGroupSpec"]["template"]["spec"]
        tokens = [each["name"] for each in pod["volumes"] if "serviceAccountToken" in str(each)]
        policies = [each["spec"] for each in objects if each["metadata"]["name"] == "ray-autoscaler"]
        scaler = cluster.get("autoscalerOptions")
        if not cluster.get("enableInTreeAutoscaling"):
            assert (tokens, policies, scaler) == ([], [], None)
            assert cluster["workerGroupSpecs"][0]["replicas"] > 0
            continue
        (mount,) = scaler["volumeMounts"]
        assert [mount["name"]] == tokens
        assert (mount["mountPath"], mount["readOnly"]) == (TOKEN_FOLDER, True)
        assert not {each["name"] for used in containers(cluster) for each in used["volumeMounts"]} & set(tokens)
        assert scaler["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        (volume,) = [each for each in pod["volumes"] if each["name"] in tokens]
        paths = [item["path"] for source in volume["projected"]["sources"] for item in walk(source) if "path" in item]
        assert sorted(paths) == ["ca.crt", "namespace", "token"]
        (policy,) = policies
        assert policy["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"
        assert {each["port"] for rule in policy["egress"] for each in rule["ports"]} == {443, 6443}


COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())


def test_compose_asks_for_its_secrets_and_listens_on_loopback():
    example = dict(
        line.split("=", 1)
        for line in (DEPLOY / "compose" / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert set(example.values()) == {""}
    asked = set()
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            if SECRET.search(name) or name == "PGPASSWORD":
                (variable,) = re.findall(r"^\$\{(\w+):\?set it in \.env\}$", value)
                asked.add(variable)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert "healthcheck" in service or name_of(service) == "store"  # which ends
    assert asked == example.keys()
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def name_of(service: dict) -> str:
    return next(name for name, each in COMPOSE["services"].items() if each is service)


def test_compose_gives_no_rights():
    for service in COMPOSE["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])


# MLflow.


def store_commands() -> list[tuple[str, dict[str, Any]]]:
    """What makes MLflow's bucket and user, and its environment, in Kubernetes and in compose."""
    (pod,) = pods(OBJECTS["Deployment", "mlflow"])
    (container,) = pod["initContainers"]
    service = COMPOSE["services"]["store"]
    assert container["command"][:2] == service["entrypoint"] == ["sh", "-ceu"]
    return [
        (container["command"][2], {each["name"]: each for each in container["env"]}),
        (service["command"][0].replace("$$", "$"), service["environment"]),
    ]


def test_mlflow_has_keys_of_its_own():
    """MinIO's root goes to MinIO and to what makes MLflow's user; both places do so by the same commands."""
    (in_kubernetes, here), (in_compose, there) = store_commands()
    assert in_kubernetes == in_compose
    assert here.keys() == there.keys()
    assert subprocess.run(["sh", "-n", "-c", in_kubernetes]).returncode == 0
    assert set(re.findall(r"\$(\w+)", in_kubernetes)) | {"MC_CONFIG_DIR"} == here.keys()
    for _, environment in mlflow_commands():
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} < environment.keys()
        assert not any(name.startswith("MINIO_") for name in environment)
    roots = [each for each in containers(list(OBJECTS.values())) if "muster-minio" in str(each)]
    assert sorted(each["name"] for each in roots) == ["minio", "store"]
    with_roots = [name for name, each in COMPOSE["services"].items() if "MINIO_ROOT_USER" in each["environment"]]
    assert with_roots == ["store", "minio"]


def test_the_commands_of_the_store_run_through_and_again(tmp_path):
    """With a stand-in for `mc` that takes what it was told, as the real one refuses to attach a policy twice."""
    (tmp_path / "mc").write_text(
        '#!/bin/sh\necho "mc $*" >> "$LOG"\n'
        'case "$*" in "alias set"*|"admin user add"*) while read line; do echo "in: $line" >> "$LOG"; done;;\n'
        '"admin policy detach"*) rm "$LOG.attached" || exit 1;;\n'
        '"admin policy attach"*) [ ! -e "$LOG.attached" ] || exit 1; touch "$LOG.attached";;\nesac\n'
    )
    (tmp_path / "mc").chmod(0o755)
    keys = {"MINIO_ROOT_USER": "root", "MINIO_ROOT_PASSWORD": "root/pass word", "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "sec:ret"}  # fmt: skip
    text, log = store_commands()[0][0], tmp_path / "log"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), **keys}
    for _ in range(2):
        log.unlink(missing_ok=True)
        subprocess.run(["sh", "-ceu", text], env=environment, check=True, timeout=60, stderr=subprocess.DEVNULL)
        assert log.read_text().splitlines() == [
            "mc alias set store http://minio:9000", "in: root", "in: root/pass word",
            "mc mb --ignore-existing store/mlflow",
            "mc admin policy create store mlflow /etc/muster/policy.json",
            "mc admin user add store", "in: key", "in: sec:ret",
            "mc admin policy detach store mlflow --user key", "mc admin policy attach store mlflow --user key",
        ]  # fmt: skip


def mlflow_commands() -> list[tuple[list[str], dict[str, str]]]:
    """The server's arguments, and its environment, where Kubernetes and compose start it."""
    (pod,) = pods(OBJECTS["Deployment", "mlflow"])
    (container,) = pod["containers"]
    assert container["command"] == ["mlflow", "server"]
    service = COMPOSE["services"]["mlflow"]
    assert service["command"][:2] == ["mlflow", "server"]
    return [
        (container["args"], {each["name"]: each.get("value", "") for each in container["env"]}),
        (service["command"][2:], service["environment"]),
    ]


@pytest.mark.parametrize("where", [0, 1], ids=["kubernetes", "compose"])
def test_mlflow_knows_its_options(where):
    arguments, environment = mlflow_commands()[where]
    given = mlflow_server().make_context("server", list(arguments)).params
    assert given["serve_artifacts"] is True
    assert given["artifacts_destination"] == "s3://mlflow"
    assert "--default-artifact-root" not in " ".join(arguments)  # runs would write to the store themselves
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql+psycopg2://")


def test_readmes_own_server_runs_nothing_for_others():
    readme = (ROOT / "trainer" / "README.md").read_text()
    (block,) = [text for text in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL) if "mlflow server" in text]
    assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false" in block
    assert "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in block
    words = shlex.split(block)
    given = mlflow_server().make_context("server", words[words.index("server") + 1 :]).params
    assert given["host"] in (None, "127.0.0.1")


def test_mlflow_knows_its_variables():
    import mlflow.environment_variables

    known = {*dir(mlflow.environment_variables), *(option.envvar for option in mlflow_server().params)}
    for _, environment in mlflow_commands():
        assert {name for name in environment if name.startswith("MLFLOW_")} <= known


def test_the_server_answers_to_the_name_that_runs_use():
    (arguments, _), _ = mlflow_commands()
    (uri,) = {
        variable["value"]
        for container in containers(CLUSTER)
        for variable in container["env"]
        if variable["name"] == "MLFLOW_TRACKING_URI"
    }
    (hosts,) = [each.partition("=")[2] for each in arguments if each.startswith("--allowed-hosts=")]
    assert uri.removeprefix("http://") in hosts.split(",")


# Images.


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


# The README.


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
