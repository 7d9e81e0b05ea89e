"""The tokenizer that a run keeps in its folder: with it and a checkpoint the run needs its data no more."""

import contextlib
import shutil
from pathlib import Path

from configs import ConfigError
from configs.sections.data import DataConfig
from trainer.data.manifest import TOKENIZER, TokenizerInfo, read_manifests, sources_of
from trainer.files.durable import digest, replace_text

from .tokenizer_files import FOLDER, INFO, copy_tokenizer, read_info, tokenizer_file


def keep_tokenizer(run_dir: Path, data: DataConfig) -> None:
    """Copy the tokenizer of prepared data, and what their manifest says of it, into a run's folder, once.

    Raises:
        ConfigError: data that are not prepared.
        OSError: the folder cannot be written.
    """
    folder, info = run_dir / FOLDER, read_manifests(data)[0].tokenizer
    with contextlib.suppress(ConfigError):  # a damaged one is written anew
        if read_info(folder) == info and _is_whole(folder, info):
            return
    shutil.rmtree(folder, ignore_errors=True)  # cut short, or of data that the run did not begin with
    folder.mkdir(mode=0o700)
    copy_tokenizer(tokenizer_file(sources_of(data)[0].path), folder)
    replace_text(folder / INFO, info.model_dump_json(indent=1) + "\n")


def tokenizer_of(run_dir: Path, data: DataConfig) -> tuple[Path, TokenizerInfo]:
    """The folder with a run's tokenizer, and which token ends a document there.

    Args:
        data: of the run; a run that keeps no tokenizer has theirs.

    Raises:
        ConfigError: neither is there, or not the one that the data were prepared with.
    """
    folder = run_dir / FOLDER
    if info := read_info(folder):
        if not _is_whole(folder, info):
            raise ConfigError(
                f"{folder / TOKENIZER} is not the tokenizer that the run was trained with (sha256 is not "
                f"{info.sha256[:12]}…):\nremove {folder} and start the run again with its data, which restores it"
            )
        return folder, info
    try:
        return Path(sources_of(data)[0].path), read_manifests(data)[0].tokenizer
    except ConfigError as error:
        why = str(error).splitlines()[0]
        raise ConfigError(
            f"{run_dir} keeps no tokenizer, as runs of older versions, and its data cannot be read: {why}\n"
            "Put them back where they were; once it is started again it keeps its tokenizer"
        ) from None


def _is_whole(folder: Path, info: TokenizerInfo) -> bool:
    file = folder / TOKENIZER
    return file.is_file() and digest(file) == info.sha256
