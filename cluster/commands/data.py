"""`muster data`: prepare text for training, inspect prepared data, show what a step reads."""

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.text import Text

from configs import ConfigError, counted, from_dict
from trainer.record.terminal import Console

from .runs import RUNS, Json, Root, Run, run_folder
from .trained import require_data

app = typer.Typer(help="Prepare and inspect training data.", no_args_is_help=True)


OF_TEXT = ("tokenizer", "vocab_size", "text_key", "workers", "limit", "strict")
OF_IMAGES = ("split", "strict")
OF_ROWS = ("split", "label", "group", "leave_out")
OF_KIND = {
    "text": OF_TEXT,
    "images": OF_IMAGES,
    "rows": OF_ROWS,
    "pairs": ("split", "strict", "group", "source", "target"),
    "graphs": ("split", "strict", "label"),
    "nodes": ("label", "directed"),
}
"""Options that one kind of data has and another has not."""


@app.command()
def prepare(
    ctx: typer.Context,
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Text, JSON, CSV or Parquet, compressed or not: files, folders, globs. Images: a folder with one "
            "subfolder per class. Rows, pairs: CSV or TSV. Graphs: SDF, or a folder of TUDataset. Nodes: CSV or TSV "
            "of edges and of nodes."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    kind: Annotated[str, typer.Option(help="text, images, rows, pairs, graphs or nodes.")] = "text",
    tokenizer: Annotated[
        str,
        typer.Option(help="bytes, bpe (trained on the data), or an existing one: file, folder or Hugging Face name."),
    ] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Size of a trained vocabulary.")] = 4096,
    held_out: Annotated[
        float, typer.Option(help="Fraction of the documents, images, ... to keep out of training.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the train/held-out split.")] = 0,
    text_key: Annotated[
        str, typer.Option(help="Key or column that holds the text; meta.text for a nested one.")
    ] = "text",
    workers: Annotated[int | None, typer.Option(help="Processes; one per processor if not given.", min=1)] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Raise a limit on input files: expansion, memory (MiB) or seconds."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on bad input instead of counting and skipping it.")
    ] = False,
    split: Annotated[
        str,
        typer.Option(help="Images, rows, pairs: random, stratified (an equal share of each class) or grouped."),
    ] = "random",
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="Rows, nodes: the column to predict; `label` if not given. SDF: its data item."
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Rows, pairs, grouped: rows of equal value stay together."),
    ] = None,
    leave_out: Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="Rows: a column to drop.")] = None,
    source: Annotated[str, typer.Option(metavar="COLUMN", help="Pairs: the texts that are read.")] = "source",
    target: Annotated[str, typer.Option(metavar="COLUMN", help="Pairs: those that are written.")] = "target",
    directed: Annotated[bool, typer.Option("--directed", help="Nodes: edges lead one way, instead of both.")] = False,
) -> None:
    """Turn text into token shards, or images, rows, pairs and graphs into Parquet. Example: muster data prepare
    'texts/**/*.jsonl.zst' --out data/texts"""
    if kind not in OF_KIND:
        raise ConfigError(f"--kind {kind}: should be text, images, rows, pairs, graphs or nodes")
    if split not in ("random", "stratified", "grouped"):
        raise ConfigError(f"--split {split}: should be random, stratified or grouped")
    for name in sorted({option for options in OF_KIND.values() for option in options} - {*OF_KIND[kind]}):
        if (given := ctx.get_parameter_source(name)) and given.name != "DEFAULT":
            raise ConfigError(f"--{name.replace('_', '-')} does not apply to --kind {kind}: leave it out")
    asked: dict[str, Any] = {"held_out": held_out, "seed": seed}
    if kind == "text":
        asked |= {"tokenizer": tokenizer, "vocab_size": vocab_size}
    limits = dict(each.partition("=")[::2] for each in limit or ())
    data = from_dict({"data": {"prepare": asked, "limits": limits}}, where="muster data prepare").data
    if kind == "text":
        from trainer.data.prepare.prepare import prepare, summary  # pyarrow and tokenizers

        made = prepare(inputs, out, data.prepare, limits=data.limits, text_key=text_key, workers=workers, strict=strict)
        print(summary(made))
        return
    from trainer.data.prepare.graphs import prepare_graphs, prepare_nodes  # pyarrow
    from trainer.data.prepare.labelled import prepare_images, prepare_pairs, prepare_rows

    chosen = cast(Any, split)
    if kind in ("graphs", "nodes") and len(label or ()) > 1:
        raise ConfigError(f"--label {label[1]}: --kind {kind} takes one: leave it out")  # type: ignore[index]
    if kind == "images":
        print(prepare_images(inputs, out, chosen, held_out, seed, strict))
    elif kind == "pairs":
        print(prepare_pairs(inputs, out, chosen, held_out, seed, (source, target), group, strict))
    elif kind == "graphs":
        print(prepare_graphs(inputs, out, chosen, held_out, seed, label[0] if label else None, strict))
    elif kind == "nodes":
        print(prepare_nodes(inputs, out, label[0] if label else "label", directed))
    else:
        labels = tuple(label or ["label"])
        print(prepare_rows(inputs, out, chosen, held_out, seed, labels, group, leave_out or ()))
    named = f" data.rows.labels=[{','.join(label)}]" if label and kind == "rows" else ""
    named += " data.kind=nodes" if kind == "nodes" else ""
    print(f"to train on it: data.path={out}{named}")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by `muster data prepare`.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every file against its SHA-256.")] = False,
    examples: Annotated[int, typer.Option(help="Training sequences to show.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Describe a prepared folder. Example: muster data inspect data/texts --verify"""
    from trainer.data.manifest import read_manifest

    read_manifest(folder)  # a mistake shows before torch is imported
    from trainer.data.show import inspect

    found = inspect(folder, verify=verify, examples=examples)
    problems = found.get("problems", [])
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print_inspection(found)
    if problems:
        raise ConfigError("\n".join(problems[:3]) + (f"\nand {len(problems) - 3} more" if len(problems) > 3 else ""))


def _print_inspection(found: dict[str, Any]) -> None:
    from trainer.data.prepare.prepare import refusals

    tokens = found["tokenizer"]
    print(f"{found['folder']}: {counted(found['input_files'], 'file')}, {counted(found['input_bytes'], 'byte')}")
    print(f"inputs: {', '.join(found['inputs'])}")
    print(f"tokenizer: {tokens['kind']}, {tokens['vocab_size']:,} tokens")
    for name, split in found["splits"].items():
        print(
            f"{name}: {counted(split['documents'], 'document')}, {counted(split['tokens'], 'token')} in "
            f"{counted(split['shards'], 'shard')} and "
            f"{counted(split['row_groups'], 'row group')}, unigram entropy {split['entropy']:.3f} nats"
        )
    for reason, count in found["refused"].items():
        print(f"left out: {refusals(reason, count)}")
    for doubt in found["doubts"]:
        print(doubt)
    for example in found.get("examples", []):
        print(f"--- {example['file']}, row group {example['row_group']}, window {example['window']}")
        print(example["text"])
    if "problems" in found and not found["problems"]:
        print("every file matches its SHA-256")


@app.command()
def show(
    run: Run,
    step: Annotated[int, typer.Option(help="Optimizer step, from 1.", min=1)],
    sequences: Annotated[int | None, typer.Option(help="Show only this many of its sequences.", min=1)] = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Print the batch that a training step reads. Example: muster data show quickstart --step 40"""
    run_dir = run_folder(run, root)
    require_data(run_dir)
    from trainer.data.read.reader import Dataset, load_tokenizer  # torch
    from trainer.run.folder import read_config

    config = read_config(run_dir)
    dataset = Dataset(config.data, config.train.seq_len, config.run.seed, split="train")
    first, batch = _cursor(run_dir, config.train.global_batch, step), config.train.global_batch
    indices = range(first, first + min(sequences or batch, batch))
    rows: list[dict[str, Any]] = []
    with load_tokenizer(config.data) as tokenizer:
        for index in indices:
            place = dataset.locate(index)
            row: dict[str, Any] = {"index": index, "file": str(place.file)}
            row |= {"row_group": place.row_group, "window": place.window}
            for name, value in dataset.sequence(index).items():
                row[name] = None if value is None else value.tolist()
            row["text"] = tokenizer.decode(row["input_ids"], skip_special_tokens=False)
            rows.append(row)
    if as_json:
        print(json.dumps({"run": run_dir.name, "step": step, "first_sequence": first, "sequences": rows}))
        return
    console = Console(soft_wrap=True)
    for row in rows:
        trained = sum(label != -100 for label in row["labels"])
        head = f"sequence {row['index']}  {Path(row['file']).name} row group {row['row_group']} window {row['window']}"
        console.print(Text(f"{head}  {trained} tokens trained on", style="bold"))
        console.print(Text(row["text"]))


def _cursor(run_dir: Path, global_batch: int, step: int) -> int:
    """Index of a step's first sequence: as recorded if the step was taken (a rollback skips some), else as planned."""
    from trainer.record.lines import read_metrics

    cursor, taken = 0, 0
    for record in read_metrics(run_dir):
        if "sequences" in record and record["step"] <= step:
            cursor, taken = record["sequences"], record["step"]
    return cursor + (step - taken - 1) * global_batch
