"""Files and folders that only their owner can read."""

import os
from pathlib import Path

from .base import ConfigError


def private_files() -> None:
    """Let this process and its children create files with mode 0600 and folders with mode 0700, whatever the umask was.

    Every process calls it first: only the owner decides who sees weights, data and logs.
    """
    os.umask(0o077)


def private_folder(folder: Path, key: str) -> Path:
    """A folder of this user alone, created or made private.

    Args:
        key: the config key that names another folder, for the message.

    Raises:
        ConfigError: it belongs to someone else, is a link, or its parent lets others replace it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # What was opened is what is checked, even if its name is replaced meanwhile.
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if (owner := os.fstat(opened).st_uid) != os.geteuid():
                raise ConfigError(f"{folder} belongs to user {owner}: set {key} to another folder")
            os.fchmod(opened, 0o700)
        finally:
            os.close(opened)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made private to this user ({error.strerror}): set {key} to another folder"
        ) from None
    return folder
