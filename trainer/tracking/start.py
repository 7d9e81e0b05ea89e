"""The training process's side of tracking, without importing MLflow: start the shipper, wait for it at the end."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from configs import MASK, Config, ConfigError, mask, mask_all
from trainer.files.durable import replace_text
from trainer.files.own_files import no_link, read_bytes
from trainer.record.lines import FULL, METRICS, last_attempt, read_events

from .tracker import Input

STATE, LOG = "tracking.json", "tracking.log"
MOST_STATE = 16 << 20
"""Bytes of the state, which has about a hundred for each file that was sent."""
LAST_CHANCE = 10.0
"""Seconds that a tracker that does not answer is given to come back as a run ends."""
GRACE = 60.0
"""Seconds without success, after training has ended or in a manual sync, until the rest is left to a later sync."""


_CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_AUTH")
"""Credentials that MLflow sends to any server."""


class NoCredentials(ConfigError):
    """The tracker's password is not to be found, or the credentials at hand are for another server."""


class ShipperHandle:
    """The running shipper of an attempt."""

    def __init__(self, run_dir: Path, process: subprocess.Popen) -> None:
        self.process = process
        self._run_dir = run_dir

    def finish(self, timeout: float = 60.0) -> str | None:
        """Wait until everything is sent, for at most `timeout` seconds. Call after `attempt_ended` is recorded.

        Returns:
            None if the tracker has everything, otherwise one line that says what is missing and what to do.
        """
        began = time.monotonic()
        while (code := self.process.poll()) is None and (waited := time.monotonic() - began) < timeout:
            if waited > LAST_CHANCE and read_state(self._run_dir).get("unreachable"):
                break  # a run's end does not wait for a tracker that does not answer
            time.sleep(0.05)
        if code is None:
            return f"tracking: still sending after {waited:.0f} s; {later(self._run_dir)}"
        if code == 0:
            return None
        error = read_state(self._run_dir).get("error") or f"the shipper exited with code {code}, see {LOG}"
        return f"tracking: {error}; `muster sync {self._run_dir}` sends the rest"


def start_shipper(run_dir: str | Path, config: Config, *, sweep: bool = False) -> ShipperHandle | None:
    """Start sending a run's record to the tracker in a process of its own, of low priority.

    Call on rank 0 after `attempt_started` is recorded. The process ends by itself after `attempt_ended`, or when this
    process is gone; a signal to this process's group does not reach it.

    Args:
        sweep: the folder is a sweep's, whose runs are sent as well (`trainer.tracking.sweep`).

    Returns:
        The shipper; None if there are no credentials for the tracker: training goes on, and a later sync sends all.

    Raises:
        ConfigError: MLflow does not accept `tracking.uri`.
    """
    run_dir = Path(run_dir)
    try:
        tracking_uri(run_dir, config)
    except NoCredentials as error:
        write_state(run_dir, read_state(run_dir) | {"error": str(error)})
        print(f"tracking: {error}. Until then nothing is sent; {later(run_dir)}", file=sys.stderr, flush=True)
        return None
    attempt = max(last_attempt(read_events(run_dir)), 1)
    # -P: a `trainer` folder in the user's working directory must not shadow this package.
    command = [sys.executable, "-P", "-m", "trainer.tracking", str(run_dir)]
    command += ["--attempt", str(attempt), "--parent-pid", str(os.getpid()), "--grace", str(GRACE)]
    command += ["--sweep"] if sweep else []
    with open(run_dir / LOG, "ab", opener=no_link) as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, close_fds=True
        )
    return ShipperHandle(run_dir, process)


def send_apart(run_dir: str | Path, *, sweep: bool = False) -> subprocess.Popen:
    """Send what is missing in a process that outlives this one. It prints nothing: see `unsent`."""
    command = [sys.executable, "-P", "-m", "trainer.tracking", str(run_dir), "--once", *(["--sweep"] if sweep else [])]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


def tracking_uri(run_dir: str | Path, config: Config) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite beside the runs; for a sweep's runs, beside the sweep.

    It includes the password, which config.yaml does not have: see `hand_down_password`.

    Raises:
        NoCredentials: the password is masked, and MLFLOW_TRACKING_URI is not the same URI with its password; or a
            config file names the server, and MLflow would send it credentials that are kept for another.
        ConfigError: it is a folder, which MLflow 3 does not accept.
    """
    root = Path(config.tracking.parent or run_dir).resolve().parent
    variable = os.environ.get("MLFLOW_TRACKING_URI")
    uri = config.tracking.uri or variable or sqlite_uri(root / "mlflow.db")
    if "://" not in uri or uri.startswith("file:"):
        raise ConfigError(
            f"tracking.uri={mask(uri)}: MLflow 3 does not record to a folder; set it to http(s)://server or "
            f"sqlite:////absolute/path.db, or leave it out for {root / 'mlflow.db'}"
        )
    _refuse_strange(uri, variable)
    if MASK not in uri:
        return uri
    if variable and mask(variable) == uri:
        return variable
    bare = re.sub(r"^(https?://)[^/]*@", r"\1", uri)
    if MASK not in bare and (os.environ.get("MLFLOW_TRACKING_PASSWORD") or os.environ.get("MLFLOW_TRACKING_TOKEN")):
        return bare  # MLflow sends the credentials of these variables
    raise NoCredentials(
        f"tracking.uri={uri}: a run's files must not contain a password; set MLFLOW_TRACKING_URI to the whole URI "
        "instead"
    )


def _refuse_strange(uri: str, variable: str | None) -> None:
    """Raise NoCredentials if a config file could make MLflow send the user's credentials to a server of its choice."""
    kept = [name for name in _CREDENTIALS if os.environ.get(name)]
    kept += ["~/.mlflow/credentials"] if Path("~/.mlflow/credentials").expanduser().exists() else []
    if kept and _server(uri) and _server(uri) != _server(variable or ""):
        raise NoCredentials(
            f"tracking.uri={mask(uri)} comes from a file, and MLflow would send {kept[0]} there. If you trust that "
            "server, set MLFLOW_TRACKING_URI to it as well"
        )


def _server(uri: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port of a web server's URI; None: it is not one."""
    try:
        found = urlsplit(uri)
        usual = {"http": 80, "https": 443}.get(found.scheme)
        return (found.scheme, found.hostname or "", found.port or usual) if usual else None
    except ValueError:  # a malformed host or port, which equals no other
        return "", uri, None


SQLITE = ("sqlite:///", "sqlite+pysqlite:///")
"""Prefixes of the URI of an SQLite file."""


def sqlite_uri(path: Path) -> str:
    """MLflow's URI of an SQLite file. A path with characters that are special in a URI is escaped, as SQLAlchemy reads
    it, and the driver is then named too: without it MLflow would create the folder of the path as escaped."""
    escaped = re.search("[?#%]", str(path))
    return f"{SQLITE[1]}{quote(str(path))}" if escaped else f"{SQLITE[0]}{path}"


def sqlite_path(uri: str) -> Path:
    """The file of an SQLite URI."""
    return Path(unquote(uri.partition(":///")[2].partition("?")[0]))


def hand_down_password(config: Config) -> None:
    """Pass the tracker's password to child processes by the environment: files and command lines only have it masked.

    Args:
        config: as the user wrote it.
    """
    uri = config.tracking.uri
    if uri and mask(uri) != uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri


def inputs_of(folder: str | Path) -> list[dict[str, Any]]:
    """A prepared data folder and its tokenizer as `attempt_started` records them under `inputs`.

    Each has name, kind, source, digest (sha256 of manifest.json and of tokenizer.json) and profile: the manifest
    without its lists of files.
    """
    folder = Path(folder).resolve()
    manifest = (folder / "manifest.json").read_bytes()
    profile = {key: value for key, value in json.loads(manifest).items() if not isinstance(value, list)}
    tokens = folder / "tokenizer.json"
    return [
        Input(folder.name, "training", str(folder), _sha256(manifest), profile)._asdict(),
        Input(f"{folder.name}-tokenizer", "tokenizer", str(tokens), _sha256(tokens.read_bytes()), {})._asdict(),
    ]


def read_state(run_dir: str | Path) -> dict[str, Any]:
    """The state that the shipper last saved: uri, run_id, experiment_id, offset (bytes of metrics.jsonl sent), missing
    (records), error, unreachable (the last attempt to send failed), tags (the user's, by name) and files (modification
    time in ns and size in bytes of each one sent)."""
    try:
        state = json.loads(read_bytes(Path(run_dir) / STATE, MOST_STATE))
    except (OSError, ValueError, RecursionError):
        return {}
    # Values of another type are ignored: they are read back from the tracker.
    known = state.items() if isinstance(state, dict) else ()
    # Older runs have the password of tracking.uri in it.
    return dict(mask_all({key: value for key, value in known if key not in _STATE or _STATE[key](value)}))


def unsent(run_dir: str | Path) -> str | None:
    """What the tracker lacks at the end of a run, and the command that sends it; None: it has everything."""
    run_dir = Path(run_dir)
    state, lines = read_state(run_dir), run_dir / METRICS
    missing = state.get("error")
    if not missing and lines.exists() and state.get("offset", 0) < lines.stat().st_size:
        missing = "part of the record is not sent yet"
    return f"tracking: {missing}; {later(run_dir)}" if missing else None


def later(run_dir: str | Path) -> str:
    """The command that sends what is missing."""
    return f"`muster sync {run_dir}` sends what is missing"


def _times(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, list) and len(each) == 2 for each in value.values())


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 2**53


_STATE: dict[str, Callable[[Any], bool]] = {
    "uri": lambda value: isinstance(value, str),
    "run_id": lambda value: isinstance(value, str),
    "experiment_id": lambda value: isinstance(value, str),
    "error": lambda value: value is None or isinstance(value, str),
    "unreachable": lambda value: isinstance(value, bool),
    "offset": _count,
    "missing": _count,
    "files": _times,
    "tags": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
}


def write_state(run_dir: Path, state: dict[str, Any]) -> None:
    """Save the state. On a full disk the old one stays: what was sent since is read back from the tracker."""
    try:
        replace_text(run_dir / STATE, json.dumps(state))
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"{run_dir / STATE}: {error.strerror}", file=sys.stderr, flush=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
