"""The files of a tokenizer: found by path or name, read within limits; and its end-of-text token."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs import ConfigError
from configs.explain import first_reason
from configs.reading.lfs import POINTER, is_pointer, refuse_pointer
from configs.reading.parse import clip, parse_json, read_text, shortened
from trainer.data.manifest import MANIFEST, TOKENIZER, TokenizerInfo, read_manifest
from trainer.files.durable import replace_bytes

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_BYTES = 256 << 20
"""The largest tokenizer.json in use have 35 MB."""
TOKENIZER_VALUES = 1 << 22
"""Lists, mappings and their elements: a BPE of 262,000 tokens, with 0.5 million merges as pairs, has 1.8 million."""
SETTINGS_BYTES = 4 << 20
"""Of each file beside it; the longest chat templates have some 0.1 MB."""

SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
"""A folder of named templates, as transformers 5 writes it."""
MOST_TEMPLATES = 32
FOLDER = "tokenizer"
"""The folder of a run's own copy."""
INFO = "info.json"
"""In that copy: the tokenizer's entry in the manifest of the data."""

_SLOW = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
"""Files of tokenizers that only their own libraries can read."""

_KNOWN_ENDS = (
    END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "<|eos|>", "[EOS]", "<EOS>", "<|eot_id|>",
    "<|im_end|>",
)  # fmt: skip


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that `path` names: the file, a folder with one (prepared data, a run, a Hugging Face model),
    or a model in this machine's cache of the Hugging Face Hub. Nothing is fetched.

    Raises:
        ConfigError: there is none, or it is larger than any tokenizer's.
    """
    if not str(path):
        raise ConfigError("the tokenizer's name is empty: give `bytes`, `bpe`, a file, a folder or a model's name")
    try:
        file = Path(path).expanduser()
        if file.is_dir():
            file = _in_folder(file)
        elif not file.is_file():
            file = _in_cache(str(path))
        if (size := file.stat().st_size) > TOKENIZER_BYTES:
            raise ConfigError(f"tokenizer {file} has {size:,} bytes, over {TOKENIZER_BYTES:,}")
        refuse_pointer(file)
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, has a NUL, or ~ of an unknown user
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"tokenizer {str(path)!r}: {error}") from None
    return file


def _in_folder(folder: Path) -> Path:
    for file in (folder / TOKENIZER, folder / FOLDER / TOKENIZER):
        if file.is_file():
            return file
    if slow := [name for name in _SLOW if (folder / name).is_file()]:
        raise ConfigError(
            f"tokenizer {folder}: it has {' and '.join(slow)}, but no {TOKENIZER}, the only format that is read.\n"
            "transformers writes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise ConfigError(f"tokenizer {folder}: no {TOKENIZER} in this folder")


def _in_cache(name: str) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache  # 0.2 s

    fetch = ""
    with contextlib.suppress(ValueError):  # not a name on the Hub
        found = try_to_load_from_cache(name, TOKENIZER)
        if isinstance(found, str) and os.path.isfile(found):
            return Path(found)
        fetch = f".\nNothing is fetched; if it is on the Hub: `hf download {name} {TOKENIZER} {SETTINGS}`"
    raise ConfigError(
        f"tokenizer {shortened(repr(name), 200)}: not `bytes`, `bpe` or an existing {TOKENIZER}, a folder with one or "
        f"the name of one in this machine's Hugging Face cache ({constants.HF_HUB_CACHE}){fetch}"
    )


def beside(file: Path) -> dict[str, bytes]:
    """The files beside a tokenizer.json that belong to it: settings, names of special tokens, chat templates.

    Returns:
        {path in the folder: content}.

    Raises:
        ConfigError: one cannot be read or has more than SETTINGS_BYTES; or there are too many.
    """
    folder = file.parent
    named = [folder / name for name in (SETTINGS, SPECIAL, TEMPLATE)]
    found = {}
    more = sorted(islice(folder.glob(f"{MORE_TEMPLATES}/*.jinja"), MOST_TEMPLATES + 1))
    if len(more) > MOST_TEMPLATES:
        raise ConfigError(
            f"{folder / MORE_TEMPLATES} has over {MOST_TEMPLATES} files: remove those that are not needed"
        )
    for path in (*named, *more):
        if path.is_file():
            found[str(path.relative_to(folder))] = _content(path)
    return found


def copy_tokenizer(file: Path, to: Path) -> None:
    """Copy a tokenizer.json and the files of `beside` into an existing folder. Raises ConfigError as `beside`."""
    for name, found in {TOKENIZER: file.read_bytes(), **beside(file)}.items():
        (to / name).parent.mkdir(mode=0o700, exist_ok=True)
        replace_bytes(to / name, found)


def settings(file: Path) -> dict[str, Any]:
    """tokenizer_config.json beside a tokenizer.json, with defaults from special_tokens_map.json.

    Raises:
        ConfigError: one cannot be read as JSON.
    """
    found: dict[str, Any] = {}
    for path in (file.with_name(SPECIAL), file.with_name(SETTINGS)):
        if not path.is_file():
            continue
        try:
            tree = parse_json(read_text(path, SETTINGS_BYTES))
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None
        if isinstance(tree, dict):
            found |= {key: value for key, value in tree.items() if value is not None}
    return found


def content(token: Any) -> str | None:
    """The text of a special token in the settings, a string or an object with `content`; None: neither."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def end_of_text(token_to_id: Callable[[str], int | None], file: Path) -> tuple[str, int]:
    """The end-of-text token and its id: the one that prepared data or a run recorded for this file, else `eos_token` of
    the settings beside it, else the first of the usual names.

    Raises:
        ConfigError: the tokenizer has none of them, or not the one that its settings name; or these cannot be read.
    """
    if (told := _told(file)) and token_to_id(told.eos_token) == told.eos_id:
        return told.eos_token, told.eos_id
    if named := content(settings(file).get("eos_token")):
        if (token := token_to_id(named)) is None:
            raise ConfigError(
                f"tokenizer {file} has no token {named!r}, which the {SETTINGS} beside it names as eos_token:\n"
                "add it to the tokenizer as a special token, or name one that it has"
            )
        return named, token
    for name in _KNOWN_ENDS:
        if (token := token_to_id(name)) is not None:
            return name, token
    raise ConfigError(
        f"tokenizer {file} has no end-of-text token: add {END_OF_TEXT} to it as a special token (or name one of "
        f"its own as eos_token in a {SETTINGS} beside it)"
    )


def read_info(folder: Path) -> TokenizerInfo | None:
    """The tokenizer's manifest entry that a run has kept; None: none. Raises ConfigError if it is damaged."""
    path = folder / INFO
    if not path.is_file():
        return None
    try:
        return TokenizerInfo.model_validate_json(read_text(path, SETTINGS_BYTES))
    except ValidationError as error:
        raise _unreadable(path, first_reason(error)) from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _told(file: Path) -> TokenizerInfo | None:
    """The entry for a tokenizer.json in the manifest or a run's info beside it, if it is for this very file."""
    try:
        told = read_manifest(file.parent).tokenizer if file.with_name(MANIFEST).is_file() else read_info(file.parent)
    except ConfigError:  # another program's file of that name
        return None
    return told if told and told.sha256 == hashlib.sha256(file.read_bytes()).hexdigest() else None


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            found = file.read(SETTINGS_BYTES + 1)
        if len(found) > SETTINGS_BYTES:
            raise ValueError(f"it has over {SETTINGS_BYTES:,} bytes")
        if is_pointer(found):
            raise ValueError(f"it is {POINTER}")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return found


def _unreadable(path: Path, error: object) -> ConfigError:
    return ConfigError(f"{path} cannot be read ({clip(error, 200)}): fix or delete it")
