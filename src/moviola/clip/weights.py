"""Tensors from a stranger's file, and nothing but tensors.

safetensors files hold no code. Files of `torch.save` are opened with `weights_only=True`. TorchScript
archives are read here as the zip they are: their `data.pkl` goes through an unpickler that knows a
handful of names and refuses every other, so nothing in the file is ever run.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moviola.clip.native import read_json, read_safetensors
from moviola.types import CheckpointError, printable

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_PICKLE_LIMIT = 1 << 26  # bytes of structure; the tensors lie beside it
_SLACK = 1 << 26  # what an archive may unpack to beyond four times its own size
# what damaged and hostile files were seen to make the zip reader and the unpicklers raise
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
    AssertionError,
    MemoryError,
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file, a shard index, a `torch.save` file or TorchScript archive.

    Raises `CheckpointError` for anything else, for damage, and for files that want code to run.
    """
    if not path.is_file():
        raise CheckpointError(f"There are no weights at {printable(path)}.")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        return read_torchscript(path) if is_torchscript(path) else _read_torch(path)
    except _DAMAGE as error:
        raise CheckpointError(
            f"{printable(path)} does not open as plain tensors: {_first_line(error)}",
            hint="Nothing of it was run. If it is damaged, download it again; if it holds more than weights, "
            "save its state_dict() alone, best as safetensors.",
        ) from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    data = read_json(index)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{printable(index)} is not a shard index: it has no weight_map.")
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{printable(index)} names a shard outside its folder: {name!r}.")
        state.update(read_weights(index.with_name(name)))
    missing = sorted(set(places) - set(state))
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of {printable(index)} are in no shard, first: {missing[0]}.",
            hint="Download the shards again.",
        )
    return state


def _read_torch(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        zipped, pickled = zipfile.is_zipfile(path), file.read(1) == b"\x80"
    if not zipped and not pickled:
        raise CheckpointError(
            f"{printable(path)} is not a file of torch.save: it is neither a zip nor a pickle.",
            hint="Was the download cut short, or is this a Git LFS pointer?",
        )
    if zipped:
        with _open_archive(path):
            pass  # the checks are in the opening
    data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    return _state_dict(data, path)


_TWO_MODELS = {"backbone_state_dict": "clip.", "state_dict": "decoder."}


def _state_dict(data: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name, out of the wrappings that training scripts put around them.

    A file with a `backbone_state_dict` beside its `state_dict` holds two models (GRAIN's does): their names
    begin with `clip.` and `decoder.` then.
    """
    if isinstance(data, Mapping) and all(isinstance(data.get(name), Mapping) for name in _TWO_MODELS):
        parts = ((prefix, _state_dict(data[name], path)) for name, prefix in _TWO_MODELS.items())
        return {f"{prefix}{key}": value for prefix, part in parts for key, value in part.items()}
    for key in ("state_dict", "model", "module", "model_state_dict", "model_state"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not data:
        raise CheckpointError(f"{printable(path)} holds no state dict, but a {type(data).__name__}.")
    others = [str(k) for k, v in data.items() if not isinstance(v, Tensor)]
    if others:
        raise CheckpointError(
            f"{printable(path)} is not a state dict: {len(others)} entries are no tensors, first {others[0]}."
        )
    return strip_prefix(dict(data), "module.")


def strip_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Names without a prefix that all of them carry."""
    if state and all(k.startswith(prefix) for k in state):
        return {k[len(prefix) :]: v for k, v in state.items()}
    return state


# --------------------------------------------------------------------------------------------------
# TorchScript archives
# --------------------------------------------------------------------------------------------------


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip that carries TorchScript's constants beside its data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def _open_archive(path: Path) -> zipfile.ZipFile:
    """The zip, once its declared sizes are plausible (weights hardly compress)."""
    archive = zipfile.ZipFile(path)
    declared = sum(info.file_size for info in archive.infolist())
    if declared > 4 * path.stat().st_size + _SLACK:
        archive.close()
        raise CheckpointError(
            f"{printable(path)} has {path.stat().st_size} bytes and would unpack to {declared}; "
            "no set of weights does."
        )
    return archive


class _Node:
    """A scripted module or object as plain attributes; nothing of it runs."""

    attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _pass(value: Any, *_: Any) -> Any:
    return value


class _TensorUnpickler(pickle.Unpickler):
    """Knows scripted classes (as `_Node`), tensors, typed lists and ordered dicts."""

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype, int], Tensor]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Node
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "build_intlist"): _pass,
            ("torch.jit._pickle", "build_doublelist"): _pass,
            ("torch.jit._pickle", "build_boollist"): _pass,
            ("torch.jit._pickle", "build_tensorlist"): _pass,
            ("torch.jit._pickle", "restore_type_tag"): _pass,
            ("torch", "device"): _pass,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something that is not a tensor's storage")
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError("a storage is described wrongly")
        return self._storage(key, dtype, count)


def _rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """A tensor over a flat storage, after checking that it lies inside."""
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor is described wrongly")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset
    if math.prod(size) > len(storage) or (all(size) and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor reaches out of its storage")
    return storage.as_strided(size, stride, offset)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive by their dotted names; its code is not looked at.

    Damage surfaces as the reader's own errors; `read_weights` turns them into `CheckpointError`.
    """
    with _open_archive(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        roots = [n[: -len("data.pkl")] for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError(f"{printable(path)} is not one TorchScript archive: {len(roots)} data.pkl.")
        root = roots[0]
        if entries[f"{root}data.pkl"].file_size > _PICKLE_LIMIT:
            raise CheckpointError(f"{printable(path)}: its structure alone is over {_PICKLE_LIMIT >> 20} MB.")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
        if order.strip() != b"little":
            raise CheckpointError(f"{printable(path)} was written on a big-endian machine; expected little.")
        cache: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            name = f"{root}data/{key}"
            if key not in cache:
                info = entries.get(name)
                if info is None or info.file_size != count * dtype.itemsize or not key.isalnum():
                    raise pickle.UnpicklingError(f"storage {key!r} is not there with {count} numbers")
                data = bytearray(info.file_size)
                with archive.open(info) as file:
                    file.readinto(data)  # type: ignore[attr-defined]
                cache[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if cache[key].dtype != dtype:
                raise pickle.UnpicklingError(f"storage {key!r} is read in two precisions")
            return cache[key]

        with archive.open(entries[f"{root}data.pkl"]) as file:
            top = _TensorUnpickler(file, storage).load()
    return _collect(top, path)


def _collect(top: Any, path: Path) -> dict[str, Tensor]:
    """Tensors of nested nodes by dotted name. A node met twice (a cycle) is entered once."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", top)]
    while stack:
        prefix, node = stack.pop()
        if not isinstance(node, _Node) or id(node) in seen:
            continue
        seen.add(id(node))
        for name, value in getattr(node, "attributes", {}).items():
            if isinstance(value, Tensor):
                state[f"{prefix}{name}"] = value
            else:
                stack.append((f"{prefix}{name}.", value))
    if not state:
        raise CheckpointError(f"{printable(path)} holds no tensors that belong to a module.")
    return state


def _first_line(error: BaseException) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    return text if text.endswith(".") else f"{text}."
