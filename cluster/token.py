"""The token that a Ray cluster asks of everyone: made for its owner's eyes only, found again, never printed.

Ray alone would start a head without a token as open to all. GCS and agents listen on every interface even so: a cluster
belongs into a private network.
"""

import json
import os
import secrets
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from configs import ConfigError


def token_file() -> Path:
    """Where Ray looks for the token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def make_token() -> Path:
    """The token's file, made where there is none, readable by its owner alone; what starts here will ask for it."""
    _refuse_open_mode()
    path = token_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        path.chmod(0o600)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    return path


def use_token(where: str) -> None:
    """Show the token to a cluster; Ray does not look for one by itself when it joins by address.

    Raises:
        ConfigError: there is none, or it is switched off.
    """
    _refuse_open_mode()
    if not os.environ.get("RAY_AUTH_TOKEN") and not token_file().is_file():
        raise ConfigError(
            f"no token for the cluster at {where}: copy the one of its head (`muster cluster up` made it) to "
            f"{token_file()}, or name its file in RAY_AUTH_TOKEN_PATH"
        )
    os.environ["RAY_AUTH_MODE"] = "token"


def _refuse_open_mode() -> None:
    if (mode := os.environ.get("RAY_AUTH_MODE", "token").lower()) != "token":
        raise ConfigError(
            f"RAY_AUTH_MODE={mode} makes a cluster on which everyone can run code: unset it, or set it to token"
        )


def is_open(url: str) -> bool:
    """Whether the job API at a URL asks nobody for a token; it says so to everyone.

    Raises:
        OSError: no such API answers there.
    """
    try:
        with urllib.request.urlopen(f"{url}/api/authentication_mode", timeout=10) as answer:
            return str(json.load(answer)["authentication_mode"]) != "token"
    except urllib.error.HTTPError as error:
        if error.code == 404:  # before Ray 2.60 nobody was asked for anything
            return True
        raise
    except (HTTPException, ValueError, KeyError) as error:
        raise ConnectionError(str(error)) from error


def refuse_open(url: str) -> None:
    """Refuse a cluster whose job API asks nobody for a token.

    Raises:
        ConfigError: it is open.
        OSError: no such API answers there.
    """
    if is_open(url):
        raise ConfigError(
            f"the cluster at {url} is open: everyone who reaches it can run code on it. Start it with "
            f"`muster cluster up`, or with RAY_AUTH_MODE=token and a token"
        )
