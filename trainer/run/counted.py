"""Parameters and FLOPs of a model of any family, counted by torch on the meta device."""

from typing import Any

import torch

from configs import Config
from configs.reading.parse import clip
from configs.sections.pairs import check_pair
from models.families import build
from models.flops import flops_of_example
from models.tasks.table import reads
from trainer.data.default import stdlib_folder
from trainer.data.kinds import kind_of, typical
from trainer.data.pairs.prepared import planned_tokenizer
from trainer.data.texts.prepared import planned_for_texts

PLANNED = {"pairs": planned_tokenizer, "texts": planned_for_texts}
"""By kind of examples: the file of the tokenizer that is made for them."""


def counts(config: Config) -> dict[str, Any]:
    """`parameters`, those of `embedding` tables among them, and `flops_per_example` in training: None if it cannot be
    counted, with the reason `flops_unknown`.

    Args:
        config: resolved, its plugins loaded.

    Raises:
        ConfigError: task and family do not match.
    """
    check_pair(config)
    with torch.device("meta"):
        module = build(config.model)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in module.parameters()), "flops_per_example": None}
    tables = {each.weight for each in module.modules() if isinstance(each, torch.nn.Embedding)}
    found["embedding"] = sum(table.numel() for table in tables)

    def example() -> Any:
        data = config.data
        if data.path == "stdlib":  # a plan prepares no data
            if not (folder := stdlib_folder(config.run.root, data.prepare)).is_dir():
                raise ValueError("FLOPs are counted once data.path=stdlib is prepared, which `muster train` does")
            data = data.model_copy(update={"path": str(folder)})
        elif (planned := PLANNED.get(reads(config))) and (file := planned(config)):
            if not file.is_file():
                made = f"data.prepare.tokenizer={data.prepare.tokenizer}"
                raise ValueError(f"FLOPs are counted once {made} is made, which `muster train` does")
            data = data.model_copy(update={"prepare": data.prepare.model_copy(update={"tokenizer": str(file)})})
        opened = kind_of(config).open(config.model_copy(update={"data": data}), "train")
        assert opened
        return opened.examples(typical(opened))

    try:
        found["flops_per_example"] = flops_of_example(config, example)
    except (ValueError, RuntimeError, OSError) as error:
        found["flops_unknown"] = clip(error, 300)
    return found
