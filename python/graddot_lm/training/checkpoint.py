"""Checkpoints without pickle: tensors in one safetensors file, everything else in JSON.

A checkpoint is a folder `step-<k>` that is renamed into place when both files are on disk:

    tensors.safetensors   every tensor and numpy array, by the path of keys that leads to it
    state.json            the nested containers, with references in the tensors' places, and both checksums
"""

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graddot_lm.errors import GraddotError
from graddot_lm.files import remove_folder, sync, temporary_for, writing


class Checkpoint(NamedTuple):
    """The state after `step`, as it was saved; all tensors on the CPU."""

    step: int
    state: dict[str, Any]


class _Packer:
    """Takes nested containers apart into JSON and named tensors.

    Tensors that are the same memory, as tied weights are, are stored once, under the first name.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple, str] = {}
        self._memory: set[tuple] = set()

    def pack(self, value: Any, name: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.Tensor):
            return {"tensor": self._add(value.detach(), name)}
        if isinstance(value, np.ndarray):
            return {"array": self._add(torch.from_numpy(value.copy()), name)}
        if isinstance(value, Mapping):  # as pairs, for an optimizer's keys are numbers
            pairs = [[self.pack(k, name), self.pack(v, f"{name}.{k}")] for k, v in value.items()]
            return {"dict": pairs}
        if isinstance(value, list | tuple):
            items = [self.pack(item, f"{name}.{index}") for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        raise TypeError(f"{name}: a checkpoint cannot hold a {type(value).__name__}")

    def _add(self, tensor: torch.Tensor, name: str) -> str:
        memory = (tensor.device, tensor.untyped_storage().data_ptr())
        view = (*memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in self._names:
            return self._names[view]
        while name in self.tensors:  # the keys 1 and "1" of a dict read the same
            name += "'"
        stored = tensor.cpu().contiguous()
        # Other views of the same memory are other tensors, but the format refuses shared memory.
        self.tensors[name] = stored.clone() if memory in self._memory else stored
        self._memory.add(memory)
        self._names[view] = name
        return name


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "array":
        return tensors[content].numpy()
    if tag == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}


def _checksums(tensors: Path, packed: Mapping[str, Any]) -> dict[str, int]:
    """Of both files, by name; of state.json's content as it is written."""
    content = json.dumps(packed).encode()
    found = zlib.crc32(np.memmap(tensors, np.uint8, "r"))  # type: ignore[arg-type]
    return {tensors.name: found, "state.json": zlib.crc32(content)}


def _read_json(folder: Path) -> dict | None:
    """state.json of a complete checkpoint, None for any other folder."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        size = (folder / "tensors.safetensors").stat().st_size
        return content if content["tensor_bytes"] == size else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        return None


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of the complete checkpoints in `folder`, in the order of steps."""
    numbered = [
        (int(path.name[5:]), path) for path in folder.glob("step-*") if path.name[5:].isdecimal()
    ]
    return [(step, path) for step, path in sorted(numbered) if _read_json(path) is not None]


def latest_checkpoint(run: str | Path) -> Path | None:
    """The last complete checkpoint of a run, None if there is none."""
    found = checkpoints(Path(run) / "checkpoints")
    return found[-1][1] if found else None


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `folder/step-<step>`, then delete all but the last `keep` checkpoints.

    `state` nests dicts, lists and tuples of tensors, numpy arrays, numbers, strings and None, and
    comes back equal in every bit. A step that is already there stays as it is: its state follows
    from the run. Raises GraddotError, leaving the older checkpoints as they are, if it cannot be
    written; ValueError for a step before the last one; TypeError for another type in `state`.
    """
    found = checkpoints(folder)
    path = folder / f"step-{step}"
    if found and step < found[-1][0]:
        raise ValueError(f"checkpoint at step {step}: there is one at step {found[-1][0]}")
    if path not in (there for _, there in found):
        _write(path, step, state)
    with writing(folder):
        for _, old in checkpoints(folder)[:-keep]:
            remove_folder(old)
    return path


def _write(path: Path, step: int, state: Mapping[str, Any]) -> None:
    packer = _Packer()
    packed = {name: packer.pack(value, name) for name, value in state.items()}
    content: dict[str, Any] = {"step": step, "state": packed}
    temporary = temporary_for(path)
    tensors, rest = temporary / "tensors.safetensors", temporary / "state.json"
    try:
        with writing(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            save_file(packer.tensors, tensors)
            content["tensor_bytes"] = tensors.stat().st_size
            content["checksums"] = _checksums(tensors, packed)
            rest.write_text(json.dumps(content), encoding="utf-8")
            shutil.copymode(rest, tensors)  # which are otherwise the owner's alone
            for each in (tensors, rest, temporary):
                sync(each)
            if path.exists():  # damaged, or it would not be written again
                remove_folder(path)
            temporary.rename(path)
            sync(path.parent)
    except SafetensorError as error:
        raise GraddotError(f"{path}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint. Tensors that were saved as one come back as one.

    Raises GraddotError if it is incomplete or damaged.
    """
    content = _read_json(Path(path))
    if content is None:
        raise GraddotError(f"{path}: not a complete checkpoint")
    try:
        tensors_file = Path(path) / "tensors.safetensors"
        tensors = load_file(tensors_file)
        state = {name: _unpack(value, tensors) for name, value in content["state"].items()}
        if Path(path).name.startswith("step-") and Path(path).name != f"step-{content['step']}":
            raise ValueError(f"state.json is of step {content['step']}")
        for name, found in _checksums(tensors_file, content["state"]).items():
            if found != content.get("checksums", {}).get(name, found):  # an older version has none
                raise ValueError(f"{name} is not what was saved, by its checksum")
        return Checkpoint(content["step"], state)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from error


def damaged(path: str | Path, error: Exception) -> GraddotError:
    """What to say of a checkpoint that cannot be read, or whose state does not fit the run."""
    return GraddotError(
        f"{path}: damaged: {error}; if you take this folder away, the run goes on from the"
        " checkpoint before it, where there is one"
    )
