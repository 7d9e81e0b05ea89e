"""Settings and texts that the data tests share."""

import json
import random
from pathlib import Path

from configs.sections.data import LimitsConfig, PrepareConfig
from trainer.data.prepare.encode import documents
from trainer.data.sources.find import find_inputs
from trainer.data.sources.read import Reader, Refusal

KEYWORDS = ["def", "return", "class", "import", "self", "None", "True", "yield"]
WORDS = [*KEYWORDS, "für", "größe", "数据", "🙂", "0", "1", "(", ")", ":", "=", "+"]

ROWS = [{"id": number, "text": f"text {number}, «ü»\nand more"} for number in range(5)]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()

SMALL = PrepareConfig(tokenizer="bytes", held_out=0.2, row_group_tokens=1000)


def make_text(seed: int, words: int) -> str:
    """Words of Python, German, Chinese and an emoji, in lines."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", "\n", "\n    "]) for _ in range(words))


def read(*inputs: Path | str, text_key: str = "text") -> tuple[list[str], list[tuple[str, str, str]]]:
    """(texts, [(file name, place, reason)])."""
    texts, refused = read_all(*inputs, text_key=text_key)
    return texts, [(Path(each.path).name, each.where, each.reason) for each in refused]


def read_all(*inputs: Path | str, text_key: str = "text") -> tuple[list[str], list[Refusal]]:
    texts: list[str] = []
    refused: list[Refusal] = []
    with Reader(text_key, LimitsConfig()) as reader:
        for file in find_inputs(inputs):
            for document in documents([item for _, item in reader.read(file)], text_key):
                if isinstance(document, bytes):
                    texts.append(document.decode())
                else:
                    refused.append(document)
    return texts, refused


def detail(path: Path) -> str:
    """The reader's reason for refusing a file, or the first item in it."""
    return read_all(path)[1][0].detail
