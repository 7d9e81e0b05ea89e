"""Commands for trained runs: `muster generate`, `muster eval`, `muster landscape`, `muster gradients`,
`muster export`."""

import contextlib
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs import Config, ConfigError, counted, load
from configs.reading.parse import is_file, shortened
from configs.units import byte_size, duration
from models.planning.cost import has_formulas
from trainer.files.durable import replace_text
from trainer.files.own_files import make_empty
from trainer.files.plain_json import dump
from trainer.record.terminal import Console

from .checkpoints import steps_of
from .runs import RUNS, Json, Root, Run, run_folder

BATCH = 8
"""Sequences evaluated at once."""
LINE_SECONDS = 10.0
"""Between lines of progress where there is no terminal."""

if TYPE_CHECKING:
    from trainer.observe.held_out import SourceLoss  # torch

Step = Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest if not given.", min=0)]
Ema = Annotated[bool, typer.Option("--ema", help="Use the averaged weights (optim.ema_decay or optim.swa_from).")]


def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=1)] = 128,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 always takes the most likely token.", min=0.0)
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling; the same seed gives the same text.")] = 0,
    step: Step = None,
    ema: Ema = False,
    root: Root = RUNS,
) -> None:
    """Generate text with a trained model. Example: muster generate quickstart --prompt 'def '"""
    run_dir = run_folder(run, root)
    steps_of(run_dir, step)  # a mistake shows before torch is imported
    from trainer.checkpoint.export import load_module
    from trainer.data.tokenizer.kept import tokenizer_of
    from trainer.data.tokenizer.prompts import Prompts  # torch
    from trainer.data.tokenizer.tokenizer import TokenizerProcess

    module, config, _ = load_module(run_dir, step, ema=ema)
    folder, info = tokenizer_of(run_dir, config.data)
    with TokenizerProcess(folder, config.data.limits) as tokenizer:
        how: dict[str, Any] = {"max_new_tokens": max_tokens, "temperature": temperature, "seed": seed}
        print(*Prompts([prompt], tokenizer, info.eos_id).continued(module, **how))


def evaluate(
    run: Run,
    data: Annotated[Path | None, typer.Option(help="Prepared data to evaluate on; the run's own if not given.")] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Number of held-out sequences; all if not given.", min=1)
    ] = None,
    step: Step = None,
    ema: Ema = False,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Compute a trained model's held-out loss, per data source. Example: muster eval quickstart --json"""
    run_dir = run_folder(run, root)
    steps_of(run_dir, step)  # a mistake shows before torch is imported
    config = load(run_dir / "config.yaml")
    if of_other_tasks(config) and (result := _of_another_kind(run_dir, data, sequences, step, ema)):
        print(json.dumps(result, indent=1) if as_json else _in_words(result))
        return
    from trainer.data.manifest import TOKENIZER, read_manifest, read_manifests

    if data:
        read_manifest(data, "--data ")
    else:
        require_data(run_dir, ", or evaluate others with --data FOLDER")
    import torch

    from trainer.checkpoint.export import load_module
    from trainer.data.read.reader import Dataset
    from trainer.data.tokenizer.kept import tokenizer_of
    from trainer.observe.held_out import held_out_loss_by_source, together

    module, config, found = load_module(run_dir, step, ema=ema)
    source = config.data.model_copy(update={"path": str(data)}) if data else config.data
    folder, info = tokenizer_of(run_dir, config.data)
    if not info.is_as(read_manifests(source)[0].tokenizer):
        raise ConfigError(
            f"--data {data} was prepared with a different tokenizer from run {run_dir.name}: use the run's own,\n"
            f"`muster data prepare ... --tokenizer {folder / TOKENIZER}`"
        )
    dataset = Dataset(source, config.train.seq_len, config.run.seed, split="held_out")
    count = min(sequences or len(dataset), len(dataset))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    by_source = Counter(dataset.locate(index).source for index in range(count))
    with _counting(module.to(device), sum(math.ceil(own / BATCH) for own in by_source.values())) as forward:
        sources = held_out_loss_by_source(forward, dataset, count, BATCH, device)
    whole = together(each for _, each in sources)
    result = {
        "run": run_dir.name,
        "step": found,
        "data": [item.path for item in dataset.sources],
        **_told(whole),
        "sources": [{"data": path} | _told(each) for path, each in sources],
    }
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for path, each in sources if len(dataset.sources) > 1 else ():
        print(f"{path}: {_line(each)}")
    for item, manifest in zip(dataset.sources, dataset.manifests, strict=True):
        if not manifest.of("held_out"):
            print(f"{item.path}: has no held-out documents, so it is not part of this loss")
    print(f"held-out loss {_line(whole)}")


def _of_another_kind(
    run_dir: Path, data: Path | None, count: int | None, step: int | None, ema: bool
) -> dict[str, Any] | None:
    """The evaluation of a task that does not train on tokens; None if it does."""
    from models.tasks.table import reads
    from trainer.checkpoint.export import load_module
    from trainer.data.kinds import kind_of
    from trainer.observe.held_out import held_out_metrics, held_out_split
    from trainer.run.plugins import load_own

    if reads(load_own(run_dir / "config.yaml")) == "tokens":
        return None
    module, config, found = load_module(run_dir, step, reads=None, ema=ema)
    if data:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(data)})})
        kind_of(config).ensure(config)
    task, nets, dataset, device, size = held_out_split(module, config, "choose other data with --data")
    count = min(count or len(dataset), len(dataset))
    loss, weight, metrics = held_out_metrics(task, nets, dataset, count, size, device)
    unit = task.counts[1]
    return {
        "run": run_dir.name,
        "step": found,
        "data": [config.data.path],
        "loss": loss,
        "weight": weight,
        "unit": unit,
        "metrics": metrics,
    }


def _in_words(result: dict[str, Any]) -> str:
    numbers = [f"{key} {value:.4f}" for key, value in result["metrics"].items() if isinstance(value, float)]
    return ", ".join([f"held-out loss {result['loss']:.4f} over {result['weight']:,} {result['unit']}", *numbers])


def of_other_tasks(config: Config) -> bool:
    """Whether a run may train on something other than tokens; to be sure, torch must be imported."""
    return bool(config.plugins) or not has_formulas(config.model)


def require_data(run_dir: Path, otherwise: str = "") -> None:
    """Raise ConfigError if a run does not learn from tokens, or its data are no longer in place.

    Args:
        otherwise: what the user can do instead of putting the data back, for the message.
    """
    from trainer.data.manifest import MANIFEST, sources_of

    config = load(run_dir / "config.yaml")
    if of_other_tasks(config):
        from models.tasks.table import reads
        from trainer.run.plugins import load_own  # torch

        config = load_own(run_dir / "config.yaml")
        if (found := reads(config)) != "tokens":
            raise ConfigError(
                f"{run_dir} trains task={config.task} on {found}: this command needs a run that trains on tokens"
            )
    for source in sources_of(config.data):
        if not is_file(Path(source.path) / MANIFEST):
            raise ConfigError(
                f"the data of run {run_dir.name} are no longer in {source.path}: put them back{otherwise}"
            )


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


def landscape(
    run: Run,
    dimensions: Annotated[int, typer.Option(help="Number of random directions, 1 or 2.", min=1, max=2)] = 2,
    trajectory: Annotated[
        bool,
        typer.Option("--trajectory", help="Use the plane through the run's checkpoints instead of random directions."),
    ] = False,
    points: Annotated[int, typer.Option(help="Points along each axis.", min=3, max=1001)] = 15,
    span: Annotated[
        float,
        typer.Option(
            help="Distance along each random direction, relative to the norm of the weights.", min=1e-6, max=1e6
        ),
    ] = 1.0,
    examples: Annotated[int, typer.Option(help="Number of held-out examples.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the random directions.")] = 0,
    step: Step = None,
    ema: Ema = False,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Draw the held-out loss around a trained model. Example: muster landscape digits-convnet --trajectory"""
    run_dir = run_folder(run, root)
    steps_of(run_dir, step)  # a mistake shows before torch is imported
    from trainer.observe.landscape import landscape as losses
    from trainer.observe.plots.landscape import plot_landscape

    how: dict[str, Any] = {"dimensions": dimensions, "trajectory": trajectory, "points": points, "span": span}
    with _progress("losses computed", points ** (2 if trajectory else dimensions)) as tell:
        found = losses(
            run_dir, step, ema=ema, examples=examples, seed=seed, on_point=lambda done, of: tell(done), **how
        )
    folder = run_dir / "plots"
    folder.mkdir(mode=0o700, exist_ok=True)
    text = dump(found.to_dict())
    plot_landscape(found, folder / "landscape.png")
    replace_text(folder / "landscape.json", text)
    print(text if as_json else f"{folder / 'landscape.png'} and landscape.json: step {found.step:,}")


def gradients(
    run: Run,
    examples: Annotated[int, typer.Option(help="Held-out examples.", min=1)] = 128,
    step: Step = None,
    ema: Ema = False,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Show the gradient of each weight, which vanishes or explodes with depth. Example: muster gradients digits-mlp"""
    run_dir = run_folder(run, root)
    steps_of(run_dir, step)  # a mistake shows before torch is imported
    from trainer.observe.gradients import gradients as computed

    found = computed(run_dir, step, ema=ema, examples=examples)
    if as_json:
        print(dump(found.to_dict()))
        return
    print(f"{found.run}: step {found.step:,}, {found.examples:,} held-out examples")
    width = max(len("weight"), *(len(each.name) for each in found.weights))
    print(f"{'weight':<{width}}  {'gradient norm':>13}  {'weight norm':>11}")
    for each in found.weights:
        print(f"{each.name:<{width}}  {each.grad_norm:13.3e}  {each.norm:11.3g}")


@contextlib.contextmanager
def _counting(forward: Callable[..., Any], batches: int) -> Iterator[Callable[..., Any]]:
    """Wrap `forward` to show progress, as `_progress`."""
    done = 0
    with _progress("batches evaluated", batches) as tell:

        def counted_forward(*given: Any) -> Any:
            nonlocal done
            out = forward(*given)
            done += 1
            tell(done)
            return out

        yield counted_forward


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told how many are done. Shows it on stderr: a bar on a terminal, elsewhere a line every ten
    seconds."""
    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task, began = bar.add_task(what, total=total), time.monotonic()
    told = began

    def tell(done: int) -> None:
        nonlocal told
        bar.update(task, completed=done)
        now = time.monotonic()
        if not console.is_terminal and now - told >= LINE_SECONDS and done < total:
            told = now
            console.print(f"{done:,} of {total:,} {what}, eta {duration((now - began) / done * (total - done))}")

    with bar:
        yield tell


FORMATS = ("hf",)
DTYPES = ("float32", "bfloat16", "float16")


def export(
    run: Run,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder to create.")] = None,
    to: Annotated[str | None, typer.Option(metavar="FORMAT", help="Format: hf, for Hugging Face transformers.")] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help=f"Data type of the weights: {', '.join(DTYPES)}.")
    ] = DTYPES[0],
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Maximum size of a weights file, such as 500MB or 2GiB.")
    ] = "5GB",
    step: Step = None,
    ema: Ema = False,
    root: Root = RUNS,
) -> None:
    """Export a trained model as a Hugging Face folder. Example: muster export quickstart --out exported"""
    if out is None and to is not None:
        print(f"muster: --to FOLDER is the old spelling and still works: write --out {to}", file=sys.stderr)
        out, to = Path(to), None
    if out is None or out == Path():
        raise ConfigError("missing --out FOLDER, for example --out exported")
    if to is not None and to not in FORMATS:
        raise ConfigError(f"--to {to}: unknown format (known: {', '.join(FORMATS)}); the folder is given by --out")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: should be one of {', '.join(DTYPES)}")
    shard_bytes = _bytes("--max-shard-size", max_shard_size)
    run_dir = run_folder(run, root)
    steps_of(run_dir, step)  # a mistake shows before torch is imported
    made = not out.exists()
    make_empty(out)
    import torch

    from trainer.checkpoint.export import export

    try:
        found = export(run_dir, out, step, getattr(torch, dtype), shard_bytes, ema=ema)
    except ConfigError:
        if made:
            with contextlib.suppress(OSError):  # not empty
                out.rmdir()
        raise
    files = [path for path in out.iterdir() if path.suffix == ".safetensors"]
    size = sum(path.stat().st_size for path in files)
    weights = "EMA weights of the checkpoint" if ema else "checkpoint"
    print(f"{weights} of step {found} exported to {out}: {dtype}, {byte_size(size)} in {counted(len(files), 'file')}")


def _bytes(option: str, text: str) -> int:
    """`500MB`, `2GiB` or a plain number, as bytes. Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([KMGT]?)(i?)B?", text.strip(), flags=re.IGNORECASE)
    size = 0.0
    if found:
        number, prefix, binary = found.groups()
        size = float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
    if size < 1:
        raise ConfigError(f"{option} {shortened(text, 40)}: should be a size, such as 500MB, 5GB or 2GiB")
    return int(size)
