"""Settings and texts that the data tests share."""

import random

from configs.sections.data import PrepareConfig

KEYWORDS = ["def", "return", "class", "import", "self", "None", "True", "yield"]
WORDS = [*KEYWORDS, "für", "größe", "数据", "🙂", "0", "1", "(", ")", ":", "=", "+"]

SMALL = PrepareConfig(tokenizer="bytes", held_out=0.2, row_group_tokens=1000)


def make_text(seed: int, words: int) -> str:
    """Words of Python, German, Chinese and an emoji, in lines."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", "\n", "\n    "]) for _ in range(words))
