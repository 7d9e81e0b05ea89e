"""The manifest of a checkpoint, checked as it is read: types, ranges, and whether its parts agree."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, ValidationError, model_validator

from configs.base import Typed, at_most
from configs.explain import first_reason
from configs.reading.parse import parse_json, shortened
from trainer.files.own_files import open_file
from trainer.state import Count, Finite, TrainState

FORMAT = 2
READABLE = (1, 2)
"""Format 1 had no boxes."""
MANIFEST = "manifest.json"
MASTER = "weight"
"""Name of the fp32 master weights among a parameter's states; the optimizer's own keep torch's names."""
EMA = "ema"
"""Name of the weights' exponential moving average among a parameter's states, if the run keeps one."""
SLOW = "slow"
"""That of Lookahead's slow weights."""
FOLLOWERS = (EMA, SLOW)
STEP = "step"
"""The optimizer's step count: a scalar, which older versions stored as a state of one-element tensors."""
ALWAYS = ("step", "cursor", "tokens", "skipped", "skipped_in_a_row", "rollbacks", "recent_losses", "loss_scale")
"""Keys of the state that every version writes."""
MOST_BYTES = 16 << 20
"""Size limit of a manifest and of a shard's header: enough for 100,000 processes, or as many fragments in one shard.
Nothing longer is written, and nothing longer is read into memory."""
MOST_FILES = 100_000
MOST_TENSORS = 1 << 18
"""Most tensors of all states together: as many as fit into MOST_BYTES at 64 bytes for a name and a shape."""
MOST_STATES = 16


def _few_tensors(shapes: Any) -> Any:
    if isinstance(shapes, dict):
        count = sum(len(names) for names in shapes.values() if isinstance(names, dict))
        if len(shapes) > MOST_STATES or count > MOST_TENSORS:
            raise ValueError(
                f"it has {len(shapes):,} states of {count:,} tensors, more than {MOST_STATES} or {MOST_TENSORS:,}"
            )
    return shapes


Shape = Annotated[tuple[Count, ...], Field(max_length=6, strict=False), FailFast()]
"""At most 6 dimensions: each doubles the corners of a slice, which `fragments.covers` compares."""
Shapes = Annotated[dict[str, dict[str, Shape]], BeforeValidator(_few_tensors)]
"""state -> parameter -> shape of the whole tensor."""
Scalars = Annotated[dict[str, Finite], at_most(MOST_STATES)]


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def committed(run_dir: Path) -> list[int]:
    """Steps with a manifest, oldest first."""
    found = (run_dir / "checkpoints").glob(f"step-*/{MANIFEST}")
    return sorted(step for path in found if (step := step_of(path.parent)) is not None)


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None if `folder` would not make such a name."""
    named = re.fullmatch(r"step-(\d{8,15})", path.name, re.ASCII)
    return int(named[1]) if named and path.name == f"step-{int(named[1]):08d}" else None


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and what is wrong with it."""


def _beside(name: str) -> str:
    if Path(name).name != name or name == "..":
        raise ValueError(f"it names a file outside its folder: {shortened(name)}")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}", name):
        raise ValueError(f"it is not a plain file name: {shortened(name)}")
    return name


Name = Annotated[str, AfterValidator(_beside)]


class File(Typed):
    """A shard."""

    name: Name
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Receipt(Typed):
    """What a rank leaves beside its shard for rank 0, which writes the manifest."""

    token: str
    shapes: Shapes
    scalars: Scalars
    fragments: Annotated[dict[str, Count], at_most(MOST_TENSORS)]
    """Number of elements of each fragment."""
    file: File


class Manifest(Typed):
    """What turns a folder of shards into a checkpoint."""

    format: Literal[1, 2]
    step: Count
    time: Annotated[Finite, Field(ge=0, le=1e11)]
    """Unix seconds."""
    state: Annotated[TrainState, at_most(64)]
    shapes: Shapes
    scalars: Scalars
    """The optimizer's scalar states, such as Adam's step, equal for every parameter."""
    files: Annotated[dict[Name, File], at_most(MOST_FILES)]
    config: dict[str, Any]
    """Config of the run that wrote it."""

    @property
    def bytes(self) -> int:
        """Total size of all shards."""
        return sum(file.bytes for file in self.files.values())

    @property
    def topology(self) -> dict[str, int | str | None]:
        """The keys of `parallel` that it was written with, as far as its config has them."""
        parallel = self.config.get("parallel")
        told = parallel.items() if isinstance(parallel, dict) else ()
        return {key: value for key, value in told if value is None or isinstance(value, int | str)}

    @model_validator(mode="after")
    def _agrees(self) -> "Manifest":
        if self.state.step != self.step:
            raise ValueError(f"step is {self.step}, but state.step is {self.state.step}")
        if wrong := [name for name, file in self.files.items() if file.name != name]:
            raise ValueError(f"files: {shortened(wrong[0])} has the name {shortened(self.files[wrong[0]].name)}")
        if not self.shapes.get(MASTER):
            raise ValueError(f"shapes: {MASTER} is missing")
        scale = self.state.loss_scale
        if scale is not None and not scale.get("cur_scale", 0) > 0:
            raise ValueError(
                f"state.loss_scale: cur_scale is {shortened(scale.get('cur_scale'))}, not a number above 0"
            )
        if both := self.shapes.keys() & self.scalars.keys() - {STEP}:
            raise ValueError(f"scalars: {shortened(min(both))} is also in shapes")
        if self.scalars.get(STEP, 0) < 0:
            raise ValueError(f"scalars: {STEP} is {self.scalars[STEP]}")
        for name in self.state.networks or [""]:
            prefix = f"{name}." if name else ""
            own = {state: {key: shape for key, shape in tensors.items() if key.startswith(prefix)}
                   for state, tensors in self.shapes.items()}  # fmt: skip
            _check_moments(own if prefix else self.shapes, set(self.state.frozen))
        return self


def _check_moments(shapes: Shapes, frozen: set[str]) -> None:
    """Raise ValueError if a parameter lacks a moment or an average that it must have, or if one has a wrong shape."""
    weights = shapes[MASTER]
    moments: dict[str, list[str]] = {name: [] for name in weights}
    for key, tensors in shapes.items():
        if key in (MASTER, STEP):
            continue
        for name, shape in tensors.items():
            if name not in weights:
                raise ValueError(f"shapes: {shortened(key)} of {shortened(name)}, which has no {MASTER}")
            whole = weights[name]
            of_rows, of_columns = (*whole[:-1], 1), (*whole[:-2], 1, *whole[-1:])  # Adafactor's
            right = {"row_var": of_rows, "col_var": of_columns}.get(key, whole) if len(whole) > 1 else whole
            if shape != right:
                raise ValueError(f"shapes: {shortened(key)} of {shortened(name)} is {list(shape)}, not {list(right)}")
            if key not in FOLLOWERS:
                moments[name].append(key)
    for key in FOLLOWERS:
        if (followed := shapes.get(key)) and (bare := weights.keys() - followed.keys() - frozen):
            raise ValueError(f"shapes: {shortened(min(bare))} has no {key}, but others have")
    # An optimizer keeps one set of moments for every parameter, or one for each kind of them (Muon, Adafactor).
    kinds: dict[tuple[str, ...], int] = {}
    kind = {name: kinds.setdefault(tuple(keys), len(kinds)) for name, keys in moments.items() if name not in frozen}
    if len(kinds) > 1 and (none := kinds.get(())) is not None:
        name = next(name for name in kind if kind[name] == none)
        raise ValueError(f"shapes: {shortened(name)} has no moments, but others have")
    for key, tensors in shapes.items():
        first = next((kind[name] for name in tensors if name in kind), None)
        for name in tensors:
            if key not in (MASTER, *FOLLOWERS, STEP) and kind.get(name) != first:
                raise ValueError(f"shapes: {shortened(name)} lacks a moment that others with {shortened(key)} have")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError if it is missing or cannot be used."""
    file = path / MANIFEST
    try:
        with open_file(file) as opened:
            data = opened.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # the latter for a path with a NUL
        raise CheckpointError(f"{shortened(str(file), 300)}: {getattr(error, 'strerror', None) or error}") from None
    manifest = parse_manifest(data, file)
    named = re.fullmatch(r"step-(\d{1,15})", path.name, re.ASCII)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{file} is for step {manifest.step}, but its folder is named {path.name}")
    return manifest


def parse_manifest(data: bytes, file: Path) -> Manifest:
    """The manifest in `file`. Raises CheckpointError, which names the file."""
    try:
        tree = _parse(data)
    except ValueError as error:
        raise CheckpointError(f"{file}: {shortened(str(error), 200)}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: not a manifest")
    if tree.get("format") not in READABLE or isinstance(tree["format"], bool):
        raise CheckpointError(f"{file}: format {shortened(tree.get('format'))}, but this version reads {READABLE}")
    _move_routers(tree.get("state"))
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        raise CheckpointError(f"{file}: {first_reason(error)}") from None
    if missing := [key for key in ALWAYS if key not in tree["state"]]:
        raise CheckpointError(f"{file}: state has no {missing[0]}")
    return manifest


def _move_routers(state: Any) -> None:
    """Convert the state of older checkpoints, which have only router memory, under a key of its own."""
    if isinstance(state, dict) and isinstance(state.get("routers"), dict) and "memory" not in state:
        state["memory"] = {f"router.{name}": rows for name, rows in state.pop("routers").items()}


def parse_receipt(data: bytes, file: Path) -> Receipt:
    """As `parse_manifest`."""
    try:
        return Receipt.model_validate(_parse(data))
    except ValidationError as error:
        raise CheckpointError(f"{file}: {first_reason(error)}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: {shortened(str(error), 200)}") from None


def _parse(data: bytes) -> Any:
    """`parse_json`, within bounds. Raises ValueError."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES:,} bytes")
    return parse_json(data)
