"""The tokenizer that a run keeps in its folder, so that a checkpoint can be used without the data."""

import contextlib
import shutil
from pathlib import Path

from configs import ConfigError
from configs.sections.data import DataConfig
from trainer.data.manifest import TOKENIZER, TokenizerInfo, read_manifests, sources_of
from trainer.files.durable import digest, replace_text

from .tokenizer import TokenizerProcess
from .tokenizer_files import FOLDER, INFO, copy_tokenizer, end_of_text, read_info, tokenizer_file


def keep_tokenizer(run_dir: Path, data: DataConfig) -> None:
    """Copy the tokenizer of prepared data, and their manifest's entry for it, into a run's folder, if not yet there.

    Raises:
        ConfigError: the data are not prepared.
        OSError: the folder cannot be written.
    """
    _keep(run_dir / FOLDER, tokenizer_file(sources_of(data)[0].path), read_manifests(data)[0].tokenizer)


def keep_tokenizer_file(run_dir: Path, data: DataConfig) -> None:
    """As `keep_tokenizer`, of data that are encoded as they are read: the file of data.prepare.tokenizer."""
    file = tokenizer_file(data.prepare.tokenizer)
    with TokenizerProcess(file, data.limits) as tokenizer:
        token, number = end_of_text(tokenizer.token_to_id, file)
        size = tokenizer.vocab_size
    info = TokenizerInfo(kind="file", sha256=digest(file), vocab_size=size, eos_id=number, eos_token=token)
    _keep(run_dir / FOLDER, file, info)


def _keep(folder: Path, file: Path, info: TokenizerInfo) -> None:
    with contextlib.suppress(ConfigError):  # a damaged copy is replaced
        if read_info(folder) == info and _is_whole(folder, info):
            return
    shutil.rmtree(folder, ignore_errors=True)  # incomplete, or from other data
    folder.mkdir(mode=0o700)
    copy_tokenizer(file, folder)
    replace_text(folder / INFO, info.model_dump_json(indent=1) + "\n")


def tokenizer_of(run_dir: Path, data: DataConfig) -> tuple[Path, TokenizerInfo]:
    """The folder with a run's tokenizer, and the tokenizer's entry in the manifest.

    Args:
        data: of the run; their tokenizer is used if the run keeps none.

    Raises:
        ConfigError: neither is there, or it is not the tokenizer that the data were prepared with.
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
            f"{run_dir} has no copy of its tokenizer (an older version's run), and its data cannot be read: {why}\n"
            "Put the data back where they were; once the run is started again it keeps a copy"
        ) from None


def _is_whole(folder: Path, info: TokenizerInfo) -> bool:
    file = folder / TOKENIZER
    return file.is_file() and digest(file) == info.sha256
