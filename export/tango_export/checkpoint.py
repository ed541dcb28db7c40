"""A checkpoint on disk: safetensors by name, lazily, shard by shard."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # gives NumPy the bfloat16 that safetensors asks for
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from tango_export.packing import Packing, parse_packing
from tango_plugins import TangoError
from tango_runtime.util.errors import first_line
from tango_runtime.util.files import is_plain_name
from tango_runtime.util.jsonschema import parse_json, shown

#: What names a tensor in one layout → what names it in ours; None where the tensor is not needed.
Rename = Callable[[str], str | None]

_DOWNLOAD_AGAIN = "download the checkpoint again"

#: Files of weights that change the others: a LoRA adapter (peft), and what LLaVA trains beside one.
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")

#: What a 4-bit layer is made of.
_PARTS = ("qweight", "qzeros", "scales", "g_idx")

#: What unquantized weights are stored in; 8-bit floats would need their scales.
_READ = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is, and what its file says of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a folder of safetensors files, under canonical names.

    Nothing is read before :meth:`read` asks for it.

    A layer that is stored in 4 bits has a weight like any other, which is made when it is read, and the tensors that it
    is made of under their own names.

    Args:
        folder: A folder with ``model.safetensors``, or shards with their index.
        rename: The canonical name of a tensor on disk, or None to leave it out.
        packing: How some layers are stored in 4 bits; None where none is.

    Attributes:
        folder: The folder.
        packing: How some layers are stored in 4 bits; None where none is.

    Raises:
        TangoError: The folder, a file or a shard is missing or cut, or two tensors have one canonical name.
    """

    def __init__(self, folder: Path, rename: Rename, packing: Packing | None = None) -> None:
        self.folder, self.packing = folder, packing
        self._where: dict[str, _Stored] = {}
        for file in _shard_files(folder):
            for stored in _list(file):
                if (name := rename(stored.name)) is not None:
                    self._add(name, stored)
        self._parts = self._take_parts() if packing else {}

    def _add(self, name: str, stored: _Stored) -> None:
        if name in self._where:
            twice = f"{stored.name} in {stored.file.name} and {self._where[name].name} in {self._where[name].file.name}"
            raise TangoError(
                f"{self.folder}: {twice} are the same tensor",
                "keep the files of one save, and of one precision: remove the others",
            )
        self._where[name] = stored

    def _take_parts(self) -> dict[str, dict[str, _Stored]]:
        """What 4-bit layers are made of, by weight and part; taken from the other tensors."""
        layers = [name.removesuffix(".qweight") for name in self._where if name.endswith(".qweight")]
        return {
            f"{layer}.weight": {
                part: self._where.pop(f"{layer}.{part}") for part in _PARTS if f"{layer}.{part}" in self._where
            }
            for layer in layers
        }

    def __contains__(self, name: str) -> bool:
        return name in self._where or name in self._parts

    def __iter__(self) -> Iterator[str]:
        yield from self._where
        yield from self._parts

    def is_packed(self, name: str) -> bool:
        """Whether a weight is stored in 4 bits."""
        return name in self._parts

    def stored_name(self, name: str) -> str:
        """What the file calls a tensor, or would call it in the layout of its neighbours."""
        if name in self._where:
            return self._where[name].name
        prefix = name.partition(".")[0] + "."
        for canonical, stored in self._where.items():
            leaf = canonical.removeprefix(prefix)
            if leaf != canonical and stored.name.endswith(leaf):
                return stored.name.removesuffix(leaf) + name.removeprefix(prefix)
        return name

    def read(self, name: str) -> NDArray[Any]:
        """Reads one tensor, in the dtype that it is stored in; a weight that is stored in 4 bits, in fp32."""
        if self.packing and name in self._parts:
            return self.packing.weight(self.read, name.removesuffix(".weight"))
        layer, _, part = name.rpartition(".")
        stored = self._where.get(name) or self._parts[f"{layer}.weight"][part]
        # Opened anew each time: pages of a file that stays mapped would add up to a copy of the checkpoint.
        with _open(stored.file) as shard:
            tensor: NDArray[Any] = shard.get_tensor(stored.name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if self.packing and name in self._parts:
            return self.packing.shape(self._parts[name]["qweight"].shape)
        return self._where[name].shape

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compares names, shapes and dtypes with what a family's graphs need.

        Args:
            expected: Shape of every tensor by canonical name.

        Raises:
            TangoError: A tensor is missing, misshapen, quantized or unknown; the message names it as the file does.
        """
        for name in self:
            if name not in expected:
                raise TangoError(
                    f"{self.folder} has a tensor that this family does not know: {self.stored_name(name)}",
                    "is it a fine-tune that adds modules? tango-export leaves no weights out",
                )
        absent = [name for name in expected if name not in self]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            first = self.stored_name(absent[0])
            raise TangoError(f"{self.folder} is missing the weight {first}{more}", _DOWNLOAD_AGAIN)
        for name, stored in self._where.items():
            if stored.shape != expected[name]:
                raise TangoError(
                    f"{self.folder}: {stored.name} has shape {list(stored.shape)}, "
                    f"its config.json says {list(expected[name])}",
                    "config.json and weights are not of the same checkpoint; " + _DOWNLOAD_AGAIN,
                )
            self.check_dtype(name)
        for name in self._parts:
            self._check_parts(name, expected[name])

    def check_dtype(self, name: str) -> None:
        """Rejects a tensor that is no plain floating-point numbers."""
        stored = self._where[name]
        if stored.dtype not in _READ:
            raise TangoError(
                f"{stored.file}: {stored.name} is stored as {stored.dtype}",
                "checkpoints that are quantized so are not read: give the original",
            )

    def _check_parts(self, name: str, shape: tuple[int, ...]) -> None:
        """Compares the parts of a 4-bit weight with its shape [out, in]."""
        assert self.packing is not None
        parts, packing = self._parts[name], self.packing
        qweight = parts["qweight"]
        if self.shape(name) != shape or shape[1] % packing.group or shape[0] % 8:
            raise TangoError(
                f"{self.folder}: {qweight.name} has shape {list(qweight.shape)}, which is no weight {list(shape)} in "
                f"groups of {packing.group}",
                "config.json and weights are not of the same checkpoint; " + _DOWNLOAD_AGAIN,
            )
        for part, wanted in packing.part_shapes(*shape).items():
            if part not in parts:
                missing = qweight.name.removesuffix("qweight") + part
                raise TangoError(f"{self.folder} is missing the weight {missing}", _DOWNLOAD_AGAIN)
            kinds = _READ if part == "scales" else ("I32",)
            if parts[part].shape != wanted or parts[part].dtype not in kinds:
                found = f"{parts[part].dtype} {list(parts[part].shape)}"
                raise TangoError(
                    f"{self.folder}: {parts[part].name} is {found}, not {' or '.join(kinds)} {list(wanted)}",
                    _DOWNLOAD_AGAIN,
                )
        if "g_idx" in parts:
            order = self.read(f"{name.removesuffix('.weight')}.g_idx")
            if not np.array_equal(order, np.arange(shape[1]) // packing.group):
                raise TangoError(
                    f"{self.folder}: {parts['g_idx'].name} has inputs in the order of their activations (act-order)",
                    "give a checkpoint that was made with desc_act: false, or the original",
                )


def renaming(rules: list[tuple[str, str | None]]) -> Rename:
    """A function that gives a stored name its canonical one: the first rule that matches its beginning wins."""
    compiled = [(re.compile(pattern), prefix) for pattern, prefix in rules]

    def rename(stored: str) -> str | None:
        for pattern, prefix in compiled:
            if match := pattern.match(stored):
                return None if prefix is None else prefix + stored[match.end() :]
        return stored

    return rename


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        TangoError: The file is missing or no JSON object.
    """
    if not file.is_file():
        raise TangoError(f"{file.parent} has no {file.name}", "name a folder in the format of the Hugging Face hub")
    data = parse_json(file.read_bytes(), str(file), _DOWNLOAD_AGAIN)
    if not isinstance(data, dict):
        raise TangoError(f"{file} is not a JSON object", _DOWNLOAD_AGAIN)
    return data


def read_packing(folder: Path) -> Packing | None:
    """How a checkpoint stores 4-bit layers, by its config.json, or an older one by a file of its own; None without.

    Raises:
        TangoError: It is quantized in a way that is not read.
    """
    config = folder / "config.json"
    data = read_json(config)
    for holder in (data, data.get("text_config")):
        found = holder.get("quantization_config") if isinstance(holder, dict) else None
        if found is not None:
            if not isinstance(found, dict):
                raise TangoError(f"{config}: quantization_config is {shown(found)}, not an object", _DOWNLOAD_AGAIN)
            return parse_packing(found, f"{config}: quantization_config")
    for file in (folder / "quantize_config.json", folder / "quant_config.json"):  # AutoGPTQ's, AutoAWQ's
        if file.is_file():
            return parse_packing(read_json(file), str(file))
    return None


def _shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: none is left out, and none is elsewhere."""
    if not folder.is_dir():
        raise TangoError(f"there is no checkpoint folder {folder}", "name a local folder, or an id on the hub")
    for name in _ADAPTERS:
        if (folder / name).exists():
            raise TangoError(
                f"{folder} has an adapter, {name}, that its weights do not hold",
                "merge it (peft: merge_and_unload), or remove it to export the weights without it",
            )
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = _shard_names(index)
        for file in files:
            if file.name not in names:
                raise TangoError(
                    f"{folder} has {file.name}, which {index.name} does not list: perhaps of another save",
                    "keep the files of one save: remove the others, or the index",
                )
        files = [folder / name for name in names]
    if not files:
        raise TangoError(f"{folder} has no safetensors file", "checkpoints in other formats are not read")
    for file in files:
        if not file.is_file():
            raise TangoError(f"{folder} has no file {file.name}, or it is something else", _DOWNLOAD_AGAIN)
    return files


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TangoError(f"{index} has no weight_map", _DOWNLOAD_AGAIN)
    for name in weight_map.values():
        if not is_plain_name(name):
            raise TangoError(f"{index}: {shown(name)} is not the name of a file in {index.parent}", _DOWNLOAD_AGAIN)
    return sorted(set(weight_map.values()))


def _list(file: Path) -> list[_Stored]:
    with _open(file) as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
        return [_Stored(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise TangoError(f"{file} is cut or no safetensors file: {first_line(error)}", _DOWNLOAD_AGAIN) from error
