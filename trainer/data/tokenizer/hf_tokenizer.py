"""A run's tokenizer as transformers loads it: it encodes text as in the data, and has the same end-of-text token."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from configs import ConfigError
from configs.reading.parse import parse_json, read_text
from trainer.data.manifest import TOKENIZER, TokenizerInfo

from .tokenizer_files import SETTINGS, SPECIAL, TOKENIZER_BYTES, TOKENIZER_VALUES, beside, content, settings

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_TOKENS = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MORE_SPECIAL_TOKENS = ("additional_special_tokens", "extra_special_tokens")
MASK = "<|mask|>"
_SIDES = ("left", "right")
_KEPT: dict[str, Callable[[Any], bool]] = {
    "chat_template": lambda value: isinstance(value, str) or _are_named(value),
    "clean_up_tokenization_spaces": lambda value: isinstance(value, bool),
    "padding_side": lambda value: value in _SIDES,
    "truncation_side": lambda value: value in _SIDES,
}
"""Settings that are kept, if transformers accepts them. Others belong to a class of tokenizers, which would not build
the one in tokenizer.json."""


def hf_tokenizer(
    folder: Path,
    info: TokenizerInfo,
    token_to_id: Callable[[str], int | None],
    max_length: int | None,
    masks: bool = False,
) -> tuple[dict[str, bytes], dict[str, int | None]]:
    """The files of an exported tokenizer, and the ids of special tokens for the model's configs.

    Prepared data have an end-of-text token after each document and no other special token. So the exported tokenizer
    adds no special tokens, has no beginning-of-text token, and neither truncates nor pads; other special tokens that
    its settings name are kept, if the tokenizer has them.

    Args:
        folder: with tokenizer.json and the files that belong to it.
        token_to_id: of the tokenizer.
        max_length: longest sequence of the model, in tokens; None: not known.
        masks: the model has a mask, whose id is the next after the tokenizer's.

    Returns:
        ({path in the folder: content}, {"bos_token_id", "eos_token_id" and "pad_token_id": id, or None if there is
        none}).

    Raises:
        ConfigError: a file cannot be read; the tokenizer has a token with the mask's name.
    """
    file = folder / TOKENIZER
    tree, files, given = _tree(file), beside(file), settings(file)
    files.pop(SPECIAL, None)  # it would repeat the settings, or contradict them
    if masks:
        if token_to_id(MASK) is not None:
            raise ConfigError(
                f"{file} has a token {MASK} of its own, so the model's mask cannot be added under that name"
            )
        tree = {**tree, "added_tokens": [*(tree.get("added_tokens") or []), _special(MASK, info.vocab_size)]}
    files[TOKENIZER] = _plain(tree, file, changed=masks)

    def known(token: Any) -> bool:
        return (name := content(token)) is not None and token_to_id(name) is not None

    special = {name: content(given[name]) for name in _SPECIAL_TOKENS if known(given.get(name))}
    special |= {"mask_token": MASK} if masks else {}
    more = {name: _among(given[name], known) for name in _MORE_SPECIAL_TOKENS if name in given}
    written: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "eos_token": info.eos_token,
        **special,
        **{name: value for name, value in more.items() if value},
        **{name: given[name] for name, fits in _KEPT.items() if name in given and fits(given[name])},
    }
    if isinstance(tree.get("pre_tokenizer"), dict) and "add_prefix_space" in tree["pre_tokenizer"]:
        written["add_prefix_space"] = tree["pre_tokenizer"]["add_prefix_space"]  # or transformers 4 sets it to false
    files[SETTINGS] = (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode()
    pad = special.get("pad_token")
    ids = {"bos_token_id": None, "eos_token_id": info.eos_id, "pad_token_id": token_to_id(pad) if pad else None}
    return files, ids


def is_qwen2s(tokenizer: bytes) -> bool:
    """Whether a tokenizer.json differs from Qwen2's only in its tokens and merges (tokenization_qwen2.py)."""
    tree = json.loads(tokenizer)
    steps = [{**each, "trim_offsets": None} for each in (tree.get("pre_tokenizer") or {}).get("pretokenizers", [])]
    own: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    return (
        tree.get("normalizer") == {"type": "NFC"}
        and steps == [{**each, "trim_offsets": None} for each in own]
        and (tree.get("decoder") or {}).get("type") == "ByteLevel"
    )


def _tree(file: Path) -> dict[str, Any]:
    try:
        tree = parse_json(read_text(file, TOKENIZER_BYTES), TOKENIZER_VALUES)
        if not isinstance(tree, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be exported: {error}") from None
    return tree


def _special(name: str, number: int) -> dict[str, Any]:
    """An added token of tokenizer.json."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, "special": True, **plain}


def _plain(tree: Mapping[str, Any], file: Path, changed: bool) -> bytes:
    """tokenizer.json without adding special tokens, truncation, padding and dropout; the file itself if it has none of
    these, and the tree is not `changed`."""
    own = {key: tree.get(key) for key in ("truncation", "padding", "post_processor", "model")}
    plain = {"truncation": None, "padding": None, "post_processor": _adds_nothing(own["post_processor"])}
    model = own["model"]
    plain["model"] = {**model, "dropout": None} if isinstance(model, dict) and model.get("dropout") else model
    return (
        file.read_bytes()
        if own == plain and not changed
        else json.dumps({**tree, **plain}, ensure_ascii=False).encode()
    )


def _adds_nothing(processor: Any) -> Any:
    """A post-processor without the parts that add special tokens; None if nothing is left."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence" and isinstance(processor.get("processors"), list):
        kept = [each for part in processor["processors"] if (each := _adds_nothing(part))]
        return {**processor, "processors": kept} if kept else None
    adds = processor.get("type") != "ByteLevel" and processor.get("special_tokens") != {}
    return None if adds else processor


def _are_named(templates: Any) -> bool:
    """Whether they are chat templates as transformers 4 wrote several: a list of {"name", "template"}."""
    if not isinstance(templates, list):
        return False
    pairs = [(each.get("name"), each.get("template")) if isinstance(each, dict) else (None,) for each in templates]
    return all(isinstance(part, str) for pair in pairs for part in pair)


def _among(tokens: Any, known: Callable[[Any], bool]) -> Any:
    """A list of special tokens, or a dict of named ones, without those that the tokenizer lacks."""
    if isinstance(tokens, dict):
        return {name: content(token) for name, token in tokens.items() if known(token)}
    return [content(token) for token in tokens if known(token)] if isinstance(tokens, list) else None
