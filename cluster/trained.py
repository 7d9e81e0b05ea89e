"""Commands over a trained run: `muster generate`, `muster eval`, `muster export`."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs import ConfigError

from .runs import RUNS, Json, Root, Run, run_folder

if TYPE_CHECKING:
    from trainer.evaluate import SourceLoss  # torch

Step = Annotated[int | None, typer.Option(help="Checkpoint of this step; the newest if not given.", min=0)]


def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0.0)] = 0.8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    step: Step = None,
    root: Root = RUNS,
) -> None:
    """Continue a text with a trained model. Example: muster generate quickstart --prompt 'def '"""
    from trainer.data.tokenizer import TokenizerProcess  # torch
    from trainer.evaluate import continue_texts
    from trainer.export import load_module
    from trainer.kept_tokenizer import tokenizer_of

    run_dir = run_folder(run, root)
    module, config, _ = load_module(run_dir, step)
    folder, info = tokenizer_of(run_dir, config.data)
    with TokenizerProcess(folder, config.data.limits) as tokenizer:
        how: dict[str, Any] = {"max_new_tokens": max_tokens, "temperature": temperature, "seed": seed}
        print(*continue_texts(module, tokenizer, info.eos_id, [prompt], **how))


def evaluate(
    run: Run,
    data: Annotated[Path | None, typer.Option(help="Prepared folder; the run's own data if not given.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Held-out sequences; all if not given.", min=1)] = None,
    step: Step = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Loss of a trained model on the held-out split, by source of a mixture. Example: muster eval quickstart --json"""
    import torch

    from trainer.data.manifest import TOKENIZER, read_manifests
    from trainer.data.reader import Dataset
    from trainer.evaluate import held_out_loss_by_source, together
    from trainer.export import load_module
    from trainer.kept_tokenizer import tokenizer_of

    run_dir = run_folder(run, root)
    module, config, found = load_module(run_dir, step)
    source = config.data.model_copy(update={"path": str(data)}) if data else config.data
    folder, info = tokenizer_of(run_dir, config.data)
    if not info.is_as(read_manifests(source)[0].tokenizer):
        raise ConfigError(
            f"--data {data} has another tokenizer than run {run_dir.name}: prepare it with the run's own,\n"
            f"`muster data prepare ... --tokenizer {folder / TOKENIZER}`"
        )
    dataset = Dataset(source, config.train.seq_len, config.run.seed, split="held_out")
    count = min(sequences or len(dataset), len(dataset))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = held_out_loss_by_source(module.to(device), dataset, count, 8, device)
    whole = together(sources.values())
    result = {
        "run": run_dir.name,
        "step": found,
        "data": [item.path for item in dataset.sources],
        **_told(whole),
        "sources": [{"data": path} | _told(each) for path, each in sources.items()],
    }
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for path, each in sources.items() if len(dataset.sources) > 1 else ():
        print(f"{path}: {_line(each)}")
    print(f"held-out loss {_line(whole)}")


def _told(part: "SourceLoss") -> dict[str, Any]:
    return {
        "loss": part.loss,
        "perplexity": math.exp(min(part.loss, 700.0)),
        "bits_per_byte": part.bits_per_byte,
        "unigram_entropy": part.unigram_entropy,
        "sequences": part.sequences,
        "tokens": part.tokens,
    }


def _line(part: "SourceLoss") -> str:
    told = _told(part)
    return (
        f"{part.loss:.4f} nats per token over {part.tokens:,} tokens (perplexity {told['perplexity']:.2f}, "
        f"{part.bits_per_byte:.3f} bits per byte; unigram entropy {part.unigram_entropy:.4f})"
    )


def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="Folder to make.")],
    step: Step = None,
    root: Root = RUNS,
) -> None:
    """Write a trained model as a Hugging Face folder. Example: muster export quickstart --to exported"""
    from trainer.export import export  # torch

    found = export(run_folder(run, root), to, step)
    print(f"checkpoint of step {found} exported to {to}")
