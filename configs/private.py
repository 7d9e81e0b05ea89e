"""Files and folders that nobody but their owner can read."""

import os
from pathlib import Path

from .base import ConfigError


def private_files() -> None:
    """Let this process, and those it starts, make files of mode 0600 and folders of mode 0700, whatever the umask was.

    Called by every process of ours as it begins: weights, data and what a run prints are their owner's to share.
    """
    os.umask(0o077)


def private_folder(folder: Path, key: str) -> Path:
    """A folder of this user's alone, made or closed to others.

    Args:
        key: what names another one, for the message.

    Raises:
        ConfigError: it is someone else's, a link, or lies where someone else could put another in its place.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # What is opened stays what is looked at, whatever takes its name meanwhile.
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if (owner := os.fstat(opened).st_uid) != os.geteuid():
                raise ConfigError(f"{folder} belongs to user {owner}: {key} names another")
            os.fchmod(opened, 0o700)
        finally:
            os.close(opened)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be a folder of this user's alone ({error.strerror}): {key} names another"
        ) from None
    return folder
