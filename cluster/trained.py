"""Commands over a trained run: `muster generate`, `muster eval`, `muster export`."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from configs import ConfigError

from .runs import RUNS, Json, Root, Run, run_folder

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
    from models.generate import generate  # torch
    from trainer.data.manifest import read_manifests
    from trainer.data.reader import load_tokenizer
    from trainer.export import load_module

    module, config, _ = load_module(run_folder(run, root), step)
    end = read_manifests(config.data)[0].tokenizer.eos_id
    with load_tokenizer(config.data) as tokenizer:
        tokens = tokenizer.encode(prompt, add_special_tokens=False) or [end]
        [added] = generate(
            module, [tokens], max_new_tokens=max_tokens, temperature=temperature, seed=seed, stop_token=end
        )
        print(prompt + tokenizer.decode(added))


def evaluate(
    run: Run,
    data: Annotated[Path | None, typer.Option(help="Prepared folder; the run's own data if not given.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Held-out sequences; all if not given.", min=1)] = None,
    step: Step = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Loss of a trained model on the held-out split. Example: muster eval quickstart --json"""
    import torch

    from trainer.data.manifest import TOKENIZER, read_manifests, sources_of
    from trainer.data.reader import Dataset
    from trainer.evaluate import held_out_loss
    from trainer.export import load_module

    run_dir = run_folder(run, root)
    module, config, found = load_module(run_dir, step)
    source = config.data.model_copy(update={"path": str(data)}) if data else config.data
    own, other = read_manifests(config.data)[0], read_manifests(source)[0]
    if own.tokenizer.sha256 != other.tokenizer.sha256:
        raise ConfigError(
            f"--data {data} has another tokenizer than run {run_dir.name}: prepare it with the run's own,\n"
            f"`muster data prepare ... --tokenizer {Path(sources_of(config.data)[0].path) / TOKENIZER}`"
        )
    dataset = Dataset(source, config.train.seq_len, config.run.seed, split="held_out")
    count = min(sequences or len(dataset), len(dataset))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss, tokens = held_out_loss(module.to(device), dataset, count, min(8, count), device)
    split = dataset.manifests[0].splits["held_out"]
    result = {
        "run": run_dir.name,
        "step": found,
        "data": [item.path for item in dataset.sources],
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) * split.tokens / split.bytes,
        "unigram_entropy": split.entropy,
        "sequences": count,
        "tokens": tokens,
    }
    if as_json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"held-out loss {loss:.4f} nats per token over {tokens:,} tokens (perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.3f} bits per byte; unigram entropy {split.entropy:.4f})"
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
