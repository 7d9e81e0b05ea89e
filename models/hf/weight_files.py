"""Finds the safetensors files of a Hugging Face folder that hold the model, and its tensors in them."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from configs import ConfigError
from configs.explain import shown
from configs.reading.lfs import refuse_pointer
from configs.reading.parse import is_file, parse_json, read_text, shortened

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX = 16 * 1024**2
"""Most bytes of an index: 160,000 tensors."""
MAX_HEADER = 32 * 1024**2
"""Most bytes of all safetensors headers together. The library itself reads three times as much from each."""
COMPARED = 2**24
"""Values that are read at a time when two tensors are compared."""
MAX_TENSORS = 200_000
"""Most tensors: a trillion parameters in separate experts are 100,000 tensors, with headers of 15 MB."""


def open_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of a folder's model by name, each with the open file (`safe_open`) that it is read from.

    Files are chosen as transformers does: `model.safetensors`, else those that the index names. Others, such as the
    `consolidated.safetensors` of Mistral's own code or a shard of an earlier export, are not read.

    Raises:
        ConfigError: no such file, several without an index, an invalid index, or not safetensors.
    """
    index, single = folder / INDEX, folder / WEIGHTS
    if is_file(index):
        where = _weight_map(index)
        if is_file(single) and (others := sorted(set(where.values()) - {WEIGHTS})):
            kept = f", or {WEIGHTS} if those do" if WEIGHTS not in where.values() else ""
            raise ConfigError(
                f"{folder} has {WEIGHTS}, the only file that transformers would read, and {INDEX}, which names "
                f"other files, such as {shown(others[0])}: delete {INDEX} if {WEIGHTS} contains the whole "
                f"model{kept}"
            )
        return _indexed(folder, where)
    found = [single] if single.exists() or single.is_symlink() else sorted(folder.glob("*.safetensors"))
    if not found:
        raise ConfigError(f"{folder} has no *.safetensors file; pickled weights (*.bin, *.pt) are not read")
    if len(found) > 1:
        raise ConfigError(
            f"{folder} has {len(found)} *.safetensors files, such as {shown([path.name for path in found[:3]])}, "
            f"but neither {WEIGHTS} nor {INDEX} to say which of them contain the model"
        )
    [file] = _open_all(found)
    names = list(file.keys())
    if names and all("lora_" in name or name.startswith("base_model.") for name in names):
        raise ConfigError(f"{folder} contains only an adapter ({found[0].name}): merge it into its base model first")
    return dict.fromkeys(names, file)


def _indexed(folder: Path, where: dict[str, str]) -> dict[str, Any]:
    """The tensors that the index names, each in the file that it names. Raises ConfigError."""
    names = list(dict.fromkeys(where.values()))
    if missing := next((name for name in names if not is_file(folder / name)), None):
        raise ConfigError(f"{folder / INDEX} names {shown(missing)}, but there is no such file beside it")
    opened = _open_all([folder / name for name in names])
    files = {name: (file, set(file.keys())) for name, file in zip(names, opened, strict=True)}
    for tensor, name in where.items():
        if tensor not in files[name][1]:
            raise ConfigError(f"{folder / INDEX} says that tensor {shown(tensor)} is in {shown(name)}, but it is not")
    for name, (file, tensors) in files.items():
        for tensor in tensors & where.keys():
            if where[tensor] != name and not same_values(files[where[tensor]][0], tensor, file, tensor):
                raise ConfigError(
                    f"{folder}: tensor {shown(tensor)} is in {shown(where[tensor])}, as {INDEX} says, but "
                    f"{shown(name)}, which it names too, has different values for it: export the model again"
                )
    return {tensor: files[name][0] for tensor, name in where.items()}


def same_values(file: Any, name: str, other: Any, other_name: str) -> bool:
    """Whether two tensors of open files are equal in shape and, in fp32, in every value. Raises ConfigError."""
    try:
        one, two = file.get_slice(name), other.get_slice(other_name)
        shape = one.get_shape()
        if shape != two.get_shape():
            return False
        if not shape:
            return torch.equal(file.get_tensor(name).float(), other.get_tensor(other_name).float())
        rows = max(1, COMPARED // max(1, math.prod(shape[1:])))
        return all(
            torch.equal(one[first : first + rows].float(), two[first : first + rows].float())
            for first in range(0, shape[0], rows)
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"tensor {shown(name)} cannot be read: {shortened(str(error), 200)}") from None


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: file beside the index}. Raises ConfigError."""
    try:
        tree = parse_json(read_text(index, MAX_INDEX))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{index} cannot be read as JSON: {error}") from None
    where = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(where, dict) or not where:
        raise ConfigError(f"{index}: weight_map should be a section of tensors, each with the name of its file")
    for tensor, name in where.items():
        if not isinstance(name, str) or "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ConfigError(
                f"{index}: weight_map has {shown(name)} for tensor {shown(tensor)}: should be the plain name of a "
                "*.safetensors file beside it"
            )
    return where


def _open_all(paths: list[Path]) -> list[Any]:
    """Safetensors files with valid headers. Raises ConfigError."""
    opened, tensors = [], 0
    if (headers := sum(map(_header, paths))) > MAX_HEADER:
        raise ConfigError(
            f"{paths[0].parent}: the headers of its safetensors files have {headers:,} bytes, over {MAX_HEADER:,}"
        )
    for path in paths:
        try:
            opened.append(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} is not safetensors: {shortened(str(error), 200)}") from None
        tensors += len(opened[-1].keys())
        if tensors > MAX_TENSORS:
            raise ConfigError(f"{path.parent}: its safetensors files contain over {MAX_TENSORS:,} tensors")
    return opened


def _header(path: Path) -> int:
    """Bytes of a safetensors file's header. Raises ConfigError."""
    try:
        if not is_file(path):
            raise ConfigError(f"{path} is not a file")
        refuse_pointer(path)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise ConfigError(f"{path} is not safetensors: a header of {header:,} bytes, over {MAX_HEADER:,}")
        return header
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not safetensors: {shortened(str(error), 200)}") from None
