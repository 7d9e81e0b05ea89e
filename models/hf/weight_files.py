"""Which safetensors files of a Hugging Face folder hold the model, and its tensors in them."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from configs import ConfigError
from configs.explain import shown
from configs.reading.parse import is_file, parse_json, read_text, shortened

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX = 16 * 1024**2
"""Bytes of an index: 160,000 tensors."""
MAX_HEADER = 32 * 1024**2
"""Bytes of the safetensors files' headers together. The library itself reads three times as much of each."""
MAX_TENSORS = 200_000
"""Those of a trillion parameters in single experts are 100,000 and have headers of 15 MB."""


def open_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of a folder's model by name, each with the open file (`safe_open`) that it is read from.

    Files are chosen as transformers does: `model.safetensors`, else those that the index names. Others, such as the
    `consolidated.safetensors` of Mistral's own code or a shard of an earlier export, are not read.

    Raises:
        ConfigError: no such file, several and nothing that says which, an index that is wrong, no safetensors.
    """
    index, single = folder / INDEX, folder / WEIGHTS
    if is_file(index):
        where = _weight_map(index)
        if is_file(single) and WEIGHTS not in where.values():
            raise ConfigError(
                f"{folder} has {WEIGHTS}, which transformers reads, and {INDEX}, which names other files: delete the "
                "one that is out of date"
            )
        return _indexed(folder, where)
    found = [single] if single.exists() or single.is_symlink() else sorted(folder.glob("*.safetensors"))
    if not found:
        raise ConfigError(f"{folder} has no *.safetensors file; pickled weights (*.bin, *.pt) are not read")
    if len(found) > 1:
        raise ConfigError(
            f"{folder} has {len(found)} *.safetensors files, such as {shown([path.name for path in found[:3]])}, but "
            f"neither {WEIGHTS} nor {INDEX}, which would say which of them hold the model"
        )
    [file] = _open_all(found)
    return dict.fromkeys(file.keys(), file)


def _indexed(folder: Path, where: dict[str, str]) -> dict[str, Any]:
    """The tensors that the index names, each in the file that it names. Raises ConfigError."""
    names = list(dict.fromkeys(where.values()))
    if missing := next((name for name in names if not is_file(folder / name)), None):
        raise ConfigError(f"{folder / INDEX} names {shown(missing)}, which is no file beside it")
    opened = _open_all([folder / name for name in names])
    files = {name: (file, set(file.keys())) for name, file in zip(names, opened, strict=True)}
    for tensor, name in where.items():
        if tensor not in files[name][1]:
            raise ConfigError(f"{folder / INDEX} says that tensor {shown(tensor)} is in {shown(name)}, but it is not")
    return {tensor: files[name][0] for tensor, name in where.items()}


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
    """Safetensors files whose headers are right. Raises ConfigError."""
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
            raise ConfigError(f"{path.parent}: its safetensors files hold over {MAX_TENSORS:,} tensors")
    return opened


def _header(path: Path) -> int:
    """Bytes of a safetensors file's header. Raises ConfigError."""
    try:
        if not is_file(path):
            raise ConfigError(f"{path} is no file")
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise ConfigError(f"{path} is not safetensors: a header of {header:,} bytes, over {MAX_HEADER:,}")
        return header
    except OSError as error:
        raise ConfigError(f"{path} is not safetensors: {shortened(str(error), 200)}") from None
