"""Tokenizers as others build them: like SentencePiece's and Llama 3's, a chat model's, one that loses text."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BOS_FIRST = {
    "single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", 1)],
}  # fmt: skip


def write(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any] | None, **changes: Any) -> Path:
    """Write tokenizer.json with some parts changed, and the settings beside it. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = json.loads(tokenizer.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def llama(folder: Path, texts: Iterable[str], vocab_size: int = 400) -> Path:
    """SentencePiece with byte fallback, as in Llama 2: encoded text begins with `<s>`; `</s>` is the end of text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *BYTES]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(**BOS_FIRST)
    added = [each for each in json.loads(tokenizer.to_str())["added_tokens"] if each["content"] not in BYTES]
    settings = {
        "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "legacy": False, "pad_token": None,
        "tokenizer_class": "LlamaTokenizer", "unk_token": {"__type": "AddedToken", "content": "<unk>"},
    }  # fmt: skip
    return write(folder, tokenizer, settings, pre_tokenizer=None, added_tokens=added)


def byte_level(texts: Iterable[str], special: Iterable[str], vocab_size: int = 320, **how: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | how)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def chat(folder: Path, texts: Iterable[str]) -> Path:
    """A chat model's, byte level: `<|im_end|>` is the end, `<|endoftext|>` the padding, a separate template file."""
    tokenizer = byte_level(texts, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    settings = {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "mask_token": "<missing>",
        "additional_special_tokens": ["<|im_start|>", "<missing>"], "tokenizer_class": "Qwen2Tokenizer",
        "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]},
    }  # fmt: skip
    write(folder, tokenizer, settings)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def llama3(folder: Path, texts: Iterable[str]) -> Path:
    """Byte level with a beginning-of-text token from a sequence of post-processors; truncates and pads; no settings
    except special_tokens_map.json."""
    tokenizer = byte_level(texts, ["<s>", "<|eot_id|>"], add_prefix_space=True)
    begin = {**BOS_FIRST, "special_tokens": [("<s>", tokenizer.token_to_id("<s>"))]}
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(**begin)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=0, pad_token="!")
    write(folder, tokenizer, None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|eot_id|>"}))
    return folder


def metaspace(folder: Path, texts: Iterable[str]) -> Path:
    """Unigram over `▁`, as in T5 and newer SentencePiece tokenizers, without settings."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return write(folder, tokenizer, None)


def uncased(folder: Path, texts: Iterable[str]) -> Path:
    """BERT's: lower case without accents; all whitespace is alike."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return write(folder, tokenizer, {"eos_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"})


def dropping(folder: Path, texts: Iterable[str]) -> Path:
    """Byte level with BPE dropout, as in training translation models: random at each call."""
    tokenizer = byte_level(texts, ["</s>"])
    tokenizer.model.dropout = 0.5
    return write(folder, tokenizer, None)


def with_a_small_alphabet(folder: Path, texts: Iterable[str], unk_token: str | None) -> Path:
    """BPE over characters: one that is not in the texts becomes `unk_token`, or nothing."""
    tokenizer = Tokenizer(models.BPE(unk_token=unk_token))
    tokenizer.decoder = decoders.Fuse()
    special = ["</s>", *([unk_token] if unk_token else [])]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    return write(folder, tokenizer, None)


ALL = {"llama": llama, "chat": chat, "llama3": llama3, "metaspace": metaspace, "uncased": uncased}
ENDS = {"llama": "</s>", "chat": "<|im_end|>", "llama3": "<|eot_id|>", "metaspace": "</s>", "uncased": "[SEP]"}
