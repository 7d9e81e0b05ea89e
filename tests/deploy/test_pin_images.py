"""deploy/pin-images against a registry of ours, which wants a token as Docker Hub does."""

import hashlib
import runpy
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFEST = b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}'


class Registry(BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, query = self.path.partition("?")
        content, code = b'{"token": "of-a-reader"}', 200
        if path != "/token":
            content, code = MANIFEST, 200 if path.endswith("/base/python/manifests/3.11-slim") else 404
            if self.headers.get("Authorization") != "Bearer of-a-reader":
                code = 401
        else:
            assert query == "service=registry&scope=repository%3Abase%2Fpython%3Apull"
        self.send_response(code)
        if code == 401:
            realm = f"http://127.0.0.1:{self.server.server_port}/token"
            self.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="registry"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def registry():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def pin(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, folder / "pin-images"], capture_output=True, text=True, timeout=60)


def test_every_tag_becomes_a_digest(registry, tmp_path):
    image, digest = f"{registry}/base/python:3.11-slim", f"@sha256:{hashlib.sha256(MANIFEST).hexdigest()}"
    shutil.copy(DEPLOY / "pin-images", tmp_path)
    files = {
        "docker/Dockerfile": "ARG PYTHON={}\nFROM ${{PYTHON}} AS source\nFROM source AS cpu\n",
        "docker/mlflow.Dockerfile": "FROM {} AS build\nFROM build\n",
        "compose/compose.yaml": "services:\n  a:\n    image: {}\n",
        "kubernetes/tracking/a.yaml": "containers:\n  - image: {}\n    name: a\n  - image: muster\n",
        "kubernetes/a/kustomization.yaml": "images:\n  - {{name: muster, newName: registry.example.com/muster}}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text.format(image))
    for old in (image, image + digest):  # the second time they are pinned
        assert (done := pin(tmp_path)).returncode == 0, done.stderr
        assert done.stdout == f"{image}{digest}\n", old
        for name, text in files.items():
            assert (tmp_path / name).read_text() == text.format(image + digest)
    (tmp_path / "docker/Dockerfile").write_text(files["docker/Dockerfile"].format(image.replace("3.11", "3.99")))
    assert (done := pin(tmp_path)).returncode == 1
    assert "404" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_finds_all_of_ours():
    """Each image of deploy/ that others make: in a Dockerfile, in compose, in the manifests."""
    image = runpy.run_path(str(DEPLOY / "pin-images"))["IMAGE"]
    files = [path for path in DEPLOY.rglob("*") if path.suffix == ".yaml" or path.name.endswith("Dockerfile")]
    names = {found["name"] for path in files for found in image.finditer(path.read_text())}
    assert names == {"postgres", "python", "quay.io/minio/minio"}
