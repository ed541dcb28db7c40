"""The bundle: a folder of ONNX graphs with a bundle.json that says all there is to know about them.

It is the only thing that passes between the rooms of the project. The dataclasses below are the schema of bundle.json:
a field is a key, its annotation is its type, and reading checks both.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.util.jsonschema import from_json

FORMAT = 2
MANIFEST = "bundle.json"

#: Weights begin at multiples of this many bytes in a graph's data file, so that they can be mapped, or used where the
#: file was copied to: cudaMalloc aligns as much, and kernels for matrices read whole lines of it.
WEIGHT_ALIGNMENT = 256

GraphName = Literal["vision", "prune", "embed", "decoder"]
GRAPHS: tuple[GraphName, ...] = get_args(GraphName)
Engine = Literal["onnxruntime", "tensorrt"]
DType = Literal["float16", "float32", "int32", "int64", "uint8"]
Precision = Literal["int8", "fp8", "int4"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: As in the graph.
        dtype: NumPy's name of the element type.
        shape: An integer, or the name of a dynamic axis (``F`` frames, ``N`` tokens, ``P`` cached tokens, ``K`` kept).
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class WeightSpec:
    """Where a weight lies.

    Attributes:
        dtype: NumPy's name of the element type.
        shape: Its dimensions.
        offset: Byte of the data file at which it begins, a multiple of ``WEIGHT_ALIGNMENT``.
    """

    dtype: DType
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        """The byte behind its last."""
        return self.offset + math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a graph were quantised.

    Attributes:
        precision: ``int8``: weights and activations, as QuantizeLinear and DequantizeLinear; ``fp8``: the same in E4M3,
            for TensorRT 10 and later; ``int4``: weights only, in blocks, as ONNX Runtime's MatMulNBits.
        clips: Videos that were observed.
        spared: Layers that lose too much: they are in the bundle's dtype, or in an ``int4`` graph have 8-bit weights.
        method: How the ranges of activations were found; None where only weights are quantised.
    """

    precision: Precision
    clips: int
    spared: tuple[str, ...]
    method: Literal["minmax", "percentile", "entropy"] | None = None


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph.

    Attributes:
        file: The graph's file, relative to the bundle.
        opset: Its ONNX opset.
        engines: What can run it.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        quantization: How its linear layers were quantised, None where they are in the bundle's dtype.
        fused: The same graph in ONNX Runtime's own operators, for its CUDA provider, with the weights of this one's
            data file; None where there is none.
        weights: Where each weight lies in the graph's data file, for a fused graph that takes them as inputs, behind
            its others; None where only the graph says so.
    """

    file: str
    opset: int
    engines: tuple[Engine, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantization: Quantization | None = None
    fused: GraphSpec | None = None
    weights: dict[str, WeightSpec] | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The graph's files: itself and, where there is one, the fused graph."""
        return (self.file, *(self.fused.files if self.fused else ()))

    @property
    def data(self) -> str:
        """The file of the graph's weights, where it has any."""
        return f"{self.file}.data"

    @property
    def taken(self) -> dict[str, WeightSpec]:
        """The weights that the fused graph takes as inputs."""
        inputs = {tensor.name for tensor in self.fused.inputs} if self.fused else set()
        return {name: weight for name, weight in (self.weights or {}).items() if name in inputs}


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and SHA-256 of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class VideoSpec:
    """How a video becomes what the vision graph takes.

    Attributes:
        frames: Frames sampled when the caller names no other number.
        size: Edge of the square that each frame is resized to, in pixels.
        resample: The filter.
        tokens_per_frame: Tokens that the vision graph gives for one frame, L.
    """

    frames: int
    size: int
    resample: Literal["bicubic"]
    tokens_per_frame: int


@dataclass(frozen=True)
class PromptSpec:
    """How a question becomes token ids around the video.

    Attributes:
        placeholder: What stands for the video in the rendered chat template.
        after_video: Rows of the embedding graph that follow the video's tokens (LLaVA's newline).
        stop: Token ids that end an answer.
        vocabulary: Ids that may be sampled: 0 up to here.
    """

    placeholder: str
    after_video: tuple[int, ...]
    stop: tuple[int, ...]
    vocabulary: int


@dataclass(frozen=True)
class DecoderSpec:
    """The decoder's dimensions.

    Attributes:
        layers: Transformer layers.
        width: Width D of its embeddings, and so of the video's tokens.
        kv_heads: Heads of the key/value cache.
        head_dim: Width of one head.
        context: Most positions, prompt and answer together.
        norm_eps: ε of its norms.
    """

    layers: int
    width: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float


@dataclass(frozen=True)
class Source:
    """Where a bundle came from.

    Attributes:
        checkpoint: Folder or hub id of the Video LLM.
        siglip: Folder or hub id of the SigLIP whose pooling head gives the salience.
        exporter: Name and version of what wrote the bundle.
    """

    checkpoint: str
    siglip: str
    exporter: str


@dataclass(frozen=True)
class Manifest:
    """What bundle.json holds.

    Attributes:
        format: Version of this schema.
        family: The model family, as ``tango-export --model`` names it.
        dtype: Type of the weights and features.
        video: How a video becomes frames.
        prompt: How a question becomes token ids.
        decoder: The decoder's dimensions.
        prune: The operator's attributes; one that is left out goes by its rule.
        graphs: Every graph by name.
        files: Every other file of the bundle by name, with its size and hash.
        source: Where it all came from.
    """

    format: int
    family: str
    dtype: Literal["float16", "float32"]
    video: VideoSpec
    prompt: PromptSpec
    decoder: DecoderSpec
    prune: dict[str, int | str | list[int]]
    graphs: dict[GraphName, GraphSpec]
    source: Source
    files: dict[str, FileSpec]

    @property
    def params(self) -> PruneParams:
        """The operator's parameters."""
        return op.params_from(self.prune)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, checked.

    Attributes:
        path: Its folder.
        manifest: What its bundle.json says.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> Bundle:
        """Reads and checks a bundle.

        Args:
            path: The bundle's folder.
            verify: Also compare every file's SHA-256, which reads all of it.

        Raises:
            TangoError: There is no bundle, its bundle.json does not fit the schema, or a file is missing, cut or
                (with ``verify``) changed. The message names it.
        """
        path = Path(path)
        bundle = cls(path, _read_manifest(path))
        bundle._check_files(verify)
        return bundle

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files.

        Raises:
            TangoError: bundle.json does not list it.
        """
        if name not in self.manifest.files:
            raise TangoError(f"{self.path / MANIFEST}: files lacks {name}", "export the bundle again")
        return self.path / name

    def text(self, name: str) -> str:
        """Content of one of the bundle's text files.

        Raises:
            TangoError: bundle.json does not list it, or it is not UTF-8.
        """
        try:
            return self.file(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TangoError(
                f"{self.path / name} is no UTF-8 text: {error}", "copy the bundle again, or export it again"
            ) from error

    def graph(self, name: GraphName) -> Path:
        """Path of a graph's ONNX file."""
        return self.path / self.manifest.graphs[name].file

    def _check_files(self, verify: bool) -> None:
        again = "copy the bundle again, or export it again"
        for name in (name for graph in self.manifest.graphs.values() for name in graph.files):
            if name not in self.manifest.files:
                raise TangoError(f"{self.path / MANIFEST}: files lacks {name}, a graph", again)
        for name, spec in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise TangoError(f"{self.path} lacks {name}, which its {MANIFEST} lists", again)
            size = file.stat().st_size
            if size != spec.size:
                raise TangoError(f"{file} has {size} bytes, {MANIFEST} says {spec.size}", again)
            if verify and sha256(file) != spec.sha256:
                raise TangoError(f"{file} has changed: its SHA-256 is not the one in {MANIFEST}", again)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes bundle.json, last of a bundle's files; a key that has nothing to say is left out."""
    data = asdict(manifest, dict_factory=lambda items: {key: value for key, value in items if value is not None})
    (folder / MANIFEST).write_text(_short(json.dumps(data, indent=2)) + "\n", encoding="utf-8")


def _short(text: str, width: int = 120) -> str:
    """JSON with what fits into one line on one line: a weight, of which there are hundreds, would take seven."""

    def joined(found: re.Match[str]) -> str:
        line = re.sub(r"\n *", "", re.sub(r",\n *", ", ", found[0]))  # no line ends inside a string
        return line if len(line) <= width else found[0]

    return re.sub(r"{[^{}]*}", joined, re.sub(r"\[[^][{}]*\]", joined, text))


def describe(file: Path) -> FileSpec:
    """Size and hash of a file, for the manifest."""
    return FileSpec(file.stat().st_size, sha256(file))


def sha256(file: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not path.is_dir():
        raise TangoError(f"there is no bundle at {path}", "make one: tango-export --model llava-ov --output FOLDER")
    if not file.is_file():
        raise TangoError(f"{path} holds no {MANIFEST}", "name a folder that tango-export made")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise TangoError(f"{file} is not JSON: {error}", "copy the bundle again, or export it again") from error
    if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
        raise TangoError(
            f"{file} has format {data['format']!r}, this tango-edge reads {FORMAT}",
            "export the bundle again, or install the tango-edge that wrote it",
        )
    manifest = from_json(Manifest, data, str(file))
    try:
        op.params_from(manifest.prune)
    except TangoError as error:
        raise TangoError(f"{file}: prune: {error.message}", error.hint) from error
    _check_dimensions(manifest, file)
    return manifest


def _check_dimensions(manifest: Manifest, file: Path) -> None:
    """Refuses dimensions that contradict one another, here and not in the middle of an answer."""
    undo = "export the bundle again, or undo the edit"
    (rows, columns), tokens = manifest.params.grid, manifest.video.tokens_per_frame
    if rows * columns != tokens:
        raise TangoError(
            f"{file}: prune: a grid of {rows}x{columns} does not hold video: tokens_per_frame {tokens}", undo
        )
    decoder, graph = manifest.decoder, manifest.graphs["decoder"]
    cache = [(decoder.kv_heads, "P", decoder.head_dim)] * (2 * decoder.layers)
    wanted = [("N", decoder.width), ("N",), *cache]
    logits = [t.shape for t in graph.outputs[:1]]
    if [t.shape for t in graph.inputs] != wanted or logits != [(manifest.prompt.vocabulary,)]:
        raise TangoError(f"{file}: decoder and prompt: vocabulary do not fit the tensors of graphs: decoder", undo)
    tables = [weight.shape[1:] for weight in manifest.graphs["embed"].taken.values()]
    if graph.fused and tables != [(decoder.width,)]:  # decoding reads its rows, too
        raise TangoError(f"{file}: graphs: decoder has a fused form, and embed none that takes its table", undo)
    for name in manifest.graphs:
        _check_weights(manifest, name, f"{file}: graphs: {name}")


def _check_weights(manifest: Manifest, name: GraphName, where: str) -> None:
    """Refuses weights that the fused graph takes in another form, or that its data file cannot hold."""
    undo, graph = "export the bundle again, or undo the edit", manifest.graphs[name]
    weights = graph.weights or {}
    # What a fused graph takes besides is what the plain one takes; in the decoder two lengths stand for the positions.
    besides = len(graph.inputs) + (name == "decoder")
    for tensor in graph.fused.inputs[besides:] if graph.fused else ():
        weight = weights.get(tensor.name)
        if weight is None:
            raise TangoError(f"{where}: weights lacks {tensor.name!r}, which fused: inputs takes", undo)
        if (weight.dtype, weight.shape) != (tensor.dtype, tensor.shape):
            raise TangoError(f"{where}: weights: {tensor.name} is not what fused: inputs takes", undo)
    size = manifest.files[graph.data].size if graph.data in manifest.files else 0
    for key, weight in weights.items():
        if weight.offset < 0 or weight.offset % WEIGHT_ALIGNMENT or weight.end > size:
            raise TangoError(f"{where}: weights: {key} does not lie in {graph.data}, of {size} bytes", undo)
