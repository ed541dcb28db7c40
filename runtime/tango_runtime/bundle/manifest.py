"""bundle.json: everything about a bundle, as dataclasses.

The dataclasses are the schema: a field is a key, its annotation is its type, and reading checks both.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Literal, get_args

import numpy as np

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.util.jsonschema import from_json

#: Version of this schema. A bundle of another format is refused with the command that exports it again.
FORMAT = 3
MANIFEST = "bundle.json"

#: Weights begin at multiples of this many bytes in a graph's data file, so that kernels use them where the file was
#: mapped or copied to: cudaMalloc aligns as much, and kernels for matrices read whole lines of it.
WEIGHT_ALIGNMENT = 256

#: A decoder that drops tokens on its way is two graphs, ``decoder_low`` and ``decoder_high``, in place of ``decoder``.
GraphName = Literal["vision", "prune", "embed", "decoder", "decoder_low", "decoder_high"]
GRAPHS: tuple[GraphName, ...] = get_args(GraphName)
Runtime = Literal["onnxruntime", "tensorrt"]
DType = Literal["float16", "float32", "int32", "int64", "uint8"]
Precision = Literal["int8", "fp8", "int4"]

_RESTORE = "export the bundle again, or undo the edit"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: Its name in the graph.
        dtype: NumPy's name of the element type.
        shape: An integer, or the name of a dynamic axis: ``F`` steps of frames, ``N`` tokens, ``P`` cached tokens,
            ``S`` cached and new ones, ``K`` kept tokens, ``H`` and ``W`` pixels, ``L`` tokens of one step of frames.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class WeightQuantization:
    """How the integers of a quantized weight become numbers: ``scale · (q − zero point)``, group by group.

    Attributes:
        bits: Bits of one element; elements of less than 8 are packed into bytes, the lower bits first.
        group_size: Consecutive input channels that share a scale; 0 where an output channel has one scale.
        scales: Name of the weight that holds the scales.
        zero_points: Name of the weight that holds the zero points; None where the integers are symmetric.
    """

    bits: Literal[4, 8]
    group_size: int
    scales: str
    zero_points: str | None = None


@dataclass(frozen=True)
class WeightSpec:
    """Where a weight is stored.

    Attributes:
        dtype: NumPy's name of the element type as stored; packed integers are ``uint8``.
        shape: Its dimensions as stored.
        offset: Its first byte in the data file, a multiple of ``WEIGHT_ALIGNMENT``.
        quantization: How its integers are read; None where the elements are the numbers.
    """

    dtype: Literal[DType, "int8"]
    shape: tuple[int, ...]
    offset: int
    quantization: WeightQuantization | None = None

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.offset + math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a graph were quantized.

    Attributes:
        precision: ``int8``: weights and activations, as QuantizeLinear and DequantizeLinear; ``fp8``: the same in E4M3,
            for TensorRT 10 and later; ``int4``: weights only, in blocks, as ONNX Runtime's MatMulNBits.
        clips: Videos that were observed.
        excluded: Layers that lose too much: they keep the bundle's dtype, or have 8-bit weights in an ``int4`` graph.
    """

    precision: Precision
    clips: int
    excluded: tuple[str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph.

    Attributes:
        file: The graph's file, relative to the bundle.
        opset: Its ONNX opset.
        runtimes: What can run it.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        quantization: How its linear layers were quantized, None where they have the bundle's dtype.
        device: The same graph for a GPU, in fused operators and with weights as inputs; None where there is none.
        weights: Where each weight is in the graph's data file. The device graph takes those that it names as inputs,
            after its other inputs. None where the weights are known to the graph only.
        tensorrt: File of the same graph in a form that TensorRT fuses, on the same data file; None where it fuses the
            graph as it is.
    """

    file: str
    opset: int
    runtimes: tuple[Runtime, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantization: Quantization | None = None
    device: GraphSpec | None = None
    weights: dict[str, WeightSpec] | None = None
    tensorrt: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The ONNX files: the graph's own and, where there are any, the device graph's and TensorRT's."""
        return (self.file, *(self.device.files if self.device else ()), *filter(None, [self.tensorrt]))

    @property
    def data(self) -> str:
        """The file of the graph's weights, where it has any."""
        return f"{self.file}.data"

    @property
    def device_weights(self) -> dict[str, WeightSpec]:
        """The weights that the device graph takes as inputs."""
        inputs = {tensor.name for tensor in self.device.inputs} if self.device else set()
        return {name: weight for name, weight in (self.weights or {}).items() if name in inputs}


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and SHA-256 of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class PixelBudget:
    """How large frames become that keep their aspect ratio.

    Attributes:
        factor: Height and width are multiples of this many pixels.
        min_pixels: Fewest pixels of a frame.
        max_pixels: Most pixels of a frame.
        total_pixels: Most pixels of all frames together.
    """

    factor: int
    min_pixels: int
    max_pixels: int
    total_pixels: int


@dataclass(frozen=True)
class VideoSpec:
    """How a video becomes the frames that the vision graph takes.

    Attributes:
        frames: Frames sampled when the caller asks for no other number.
        size: (height, width) in pixels that every frame is resized to; with a ``budget``, the default that engines are
            built for.
        resample: The filter.
        tokens_per_frame: Tokens L that the vision graph gives for one step of frames of that size.
        frames_per_step: Consecutive frames that the vision graph takes as one.
        sampling: How the indices ``linspace(0, n − 1, F)`` become integers; ``nearest`` rounds halves to even.
        budget: Set where a frame keeps its aspect ratio; None where every frame has ``size``.
    """

    frames: int
    size: tuple[int, int]
    resample: Literal["bicubic"]
    tokens_per_frame: int
    frames_per_step: Literal[1, 2]
    sampling: Literal["floor", "nearest"]
    budget: PixelBudget | None = None

    def total_tokens(self, frames: int) -> int:
        """Video tokens of so many frames at the default size, F·L."""
        return -(-frames // self.frames_per_step) * self.tokens_per_frame


@dataclass(frozen=True)
class PromptSpec:
    """How a question becomes token ids around the video.

    Attributes:
        placeholder: What stands for the video in the rendered chat template.
        after_video: Rows of the embedding graph that follow the video's tokens (LLaVA-OneVision's newline).
        stop: Token ids that end an answer.
        vocabulary: Ids that may be sampled: 0 up to here.
        row_end: Row of the embedding graph that follows each grid row with a kept token (LLaVA-Video's newline); None
            for none.
        video_text: Text between the video and the question, a format string over ``duration`` (seconds), ``frames``
            (their number) and ``times`` (``0.00s,1.00s,…``); None for none.
    """

    placeholder: str
    after_video: tuple[int, ...]
    stop: tuple[int, ...]
    vocabulary: int
    row_end: int | None = None
    video_text: str | None = None


@dataclass(frozen=True)
class RotarySpec:
    """Rotary positions on three axes (time, row, column), as Qwen2.5-VL has them.

    A decoder with them has one more input, ``rotary`` [3, N] int64, beside the cache slots in ``positions`` [N].

    Attributes:
        sections: Frequencies of each axis; their sum is half of ``head_dim``.
        time_step: ``seconds``: time ids follow the clip's clock; ``unit``: two ids a step, as the authors of Tango do.
        tokens_per_second: Time ids of one second.
    """

    sections: tuple[int, int, int]
    time_step: Literal["seconds", "unit"]
    tokens_per_second: int


@dataclass(frozen=True)
class VisionSpec:
    """Dimensions of the vision tower and its projector, from which memory and time are estimated.

    Attributes:
        layers: Transformer layers.
        hidden_size: Width of the tower.
        intermediate_size: Width of its MLP.
        heads: Attention heads.
        patches: Patches of one step of frames at the default size.
        projector: Weights of the projector's linear layers that run on each patch, and of those that run on each token.
        mlp: ``gated`` if the MLP has a third linear layer, the gate.
        global_layers: Layers that attend to all patches of a step; None for every layer.
        window: Patches of an attention window in the other layers.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    patches: int
    projector: tuple[int, int]
    mlp: Literal["plain", "gated"]
    global_layers: int | None = None
    window: int | None = None


@dataclass(frozen=True)
class InnerPruning:
    """A decoder that drops some of the video's rows on its way.

    Attributes:
        layer: The first layer that runs without them, counted from 0. Those before it are the graph ``decoder_low``.
        ratio: Share of the video's rows that stay, row ends included.
    """

    layer: int
    ratio: float

    def kept(self, rows: int) -> int:
        """How many of the video's rows stay: the nearest number, halves to even."""
        return round(rows * self.ratio)

    def share(self, layers: int) -> float:
        """Share of the video's rows that a layer sees, in the mean over a decoder's layers."""
        return (self.layer + (layers - self.layer) * self.ratio) / layers


@dataclass(frozen=True)
class DecoderSpec:
    """The decoder's dimensions.

    Attributes:
        layers: Transformer layers.
        hidden_size: Width D of its embeddings, and so of the video's tokens.
        intermediate_size: Width of its MLP.
        heads: Attention heads.
        kv_heads: Heads of the key/value cache.
        head_dim: Width of one head.
        context: Most positions, prompt and answer together.
        norm_eps: ε of its norms.
        rotary: Its positions on three axes; None where a token's position is its cache slot.
        inner: Which of the video's rows it drops on its way; None where every layer sees all of them.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    rotary: RotarySpec | None = None
    inner: InnerPruning | None = None


@dataclass(frozen=True)
class Source:
    """Where a bundle came from.

    Attributes:
        checkpoint: Folder or hub id of the Video LLM.
        exporter: Name and version of what wrote the bundle.
        salience: Folder or hub id of the checkpoint whose pooling head gives the salience; None where the Video LLM
            itself does.
    """

    checkpoint: str
    exporter: str
    salience: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What bundle.json holds.

    Attributes:
        format: Version of this schema.
        family: The model family, as ``tango-export --model`` names it.
        dtype: Type of the weights and features.
        video: How a video becomes frames.
        prompt: How a question becomes token ids.
        vision: The vision tower's dimensions.
        decoder: The decoder's dimensions.
        prune: The operator's attributes, attention sinks included.
        graphs: Every graph by name.
        files: Every other file of the bundle by name, with its size and hash.
        source: Where it all came from.
    """

    format: int
    family: str
    dtype: Literal["float16", "float32"]
    video: VideoSpec
    prompt: PromptSpec
    vision: VisionSpec
    decoder: DecoderSpec
    prune: dict[str, int | str | list[int]]
    graphs: dict[GraphName, GraphSpec]
    source: Source
    files: dict[str, FileSpec]

    @property
    def params(self) -> PruneParams:
        """The operator's parameters."""
        params, inner = op.params_from(self.prune), self.decoder.inner
        return replace(params, decoder_share=inner.share(self.decoder.layers)) if inner else params

    @property
    def decoders(self) -> tuple[GraphName, ...]:
        """The decoder's graphs, in the order in which they run."""
        return ("decoder_low", "decoder_high") if self.decoder.inner else ("decoder",)

    def graph_files(self, name: GraphName) -> tuple[str, ...]:
        """Every file of a graph: its ONNX files, and its weights where it has any."""
        graph = self.graphs[name]
        return (*self._with_data(name, graph.file), *graph.files[1:])

    def engine_files(self, name: GraphName) -> tuple[str, ...]:
        """The files that TensorRT builds a graph's engine from."""
        graph = self.graphs[name]
        return self._with_data(name, graph.tensorrt or graph.file)

    def _with_data(self, name: GraphName, file: str) -> tuple[str, ...]:
        data = self.graphs[name].data
        return (file, data) if data in self.files else (file,)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes bundle.json, last of a bundle's files; a key whose value is None is left out."""
    data = asdict(manifest, dict_factory=lambda items: {key: value for key, value in items if value is not None})
    (folder / MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Reads and checks the bundle.json of a folder.

    Raises:
        TangoError: There is none, it is not JSON, has another format, or contradicts the schema or itself.
    """
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
        raise TangoError(f"{file} has format {data['format']!r}, this tango-edge reads {FORMAT}", _export_again(data))
    manifest = from_json(Manifest, data, str(file))
    try:
        op.params_from(manifest.prune)
    except TangoError as error:
        raise TangoError(f"{file}: prune: {error.message}", error.hint) from error
    _check_graphs(manifest, file)
    _check_names(manifest, file)
    if manifest.prompt.video_text is not None:
        _check_video_text(manifest.prompt.video_text, file)
    _check_dimensions(manifest, file)
    for name in manifest.graphs:
        _check_weights(manifest, name, f"{file}: graphs: {name}")
    return manifest


def _export_again(data: dict[str, object]) -> str:
    """The command that makes a bundle of another format anew, as far as its bundle.json names its origin."""
    source, decoder, prune = (
        part if isinstance(part := data.get(key), dict) else {} for key in ("source", "decoder", "prune")
    )
    command = ["tango-export", "--model", str(data.get("family", "FAMILY"))]
    command += ["--checkpoint", str(source.get("checkpoint", "CHECKPOINT"))]
    if salience := source.get("salience", source.get("siglip")):
        command += ["--salience-checkpoint", str(salience)]
    if context := decoder.get("context"):
        command += ["--context", str(context)]
    if isinstance(sinks := prune.get("sink_positions"), list):
        command += ["--sink-positions", *map(str, sinks)]
    return f"export it again: {shlex.join(command)} --output FOLDER"


def _check_graphs(manifest: Manifest, file: Path) -> None:
    """Refuses a bundle that lacks a graph, or has one that it does not need."""
    wanted = {"vision", "prune", "embed", *manifest.decoders}
    for name in sorted(wanted.symmetric_difference(manifest.graphs)):
        problem = "has no" if name in wanted else "needs no"
        raise TangoError(f"{file}: graphs {problem} {name!r}", _RESTORE)


def _check_names(manifest: Manifest, file: Path) -> None:
    """Refuses names that lead outside of the bundle."""
    graphs = [name for graph in manifest.graphs.values() for name in graph.files]
    for name in (*manifest.files, *graphs):
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise TangoError(f"{file}: files: {name!r} is not a name inside of the bundle", _RESTORE)


def _check_video_text(text: str, file: Path) -> None:
    """Refuses what is no format string over what is known of a video."""
    try:
        for _, name, _, _ in Formatter().parse(text):
            if name not in (None, "duration", "frames", "times"):
                raise TangoError(f"{file}: prompt: video_text has an unknown field {name!r}", _RESTORE)
        text.format(duration=0.0, frames=0, times="")
    except ValueError as error:
        raise TangoError(f"{file}: prompt: video_text is no format string: {error}", _RESTORE) from error


def _check_dimensions(manifest: Manifest, file: Path) -> None:
    """Refuses dimensions that contradict one another here, and not in the middle of an answer."""
    decoder, inner = manifest.decoder, manifest.decoder.inner
    if inner and not (0 < inner.layer < decoder.layers and 0 < inner.ratio <= 1):
        raise TangoError(f"{file}: decoder: inner is out of range", _RESTORE)
    (rows, columns), tokens = manifest.params.grid, manifest.video.tokens_per_frame
    if rows * columns != tokens:
        raise TangoError(
            f"{file}: prune: a grid of {rows}x{columns} does not hold video: tokens_per_frame {tokens}", _RESTORE
        )
    if decoder.rotary and 2 * sum(decoder.rotary.sections) != decoder.head_dim:
        raise TangoError(f"{file}: decoder: rotary: sections do not fit head_dim {decoder.head_dim}", _RESTORE)
    tables = [weight.shape[1:] for weight in manifest.graphs["embed"].device_weights.values()]
    for name in manifest.decoders:
        graph = manifest.graphs[name]
        first = ("N", decoder.hidden_size) if name == "decoder_low" else (manifest.prompt.vocabulary,)
        shapes = [tensor.shape for tensor in (*graph.inputs, *graph.outputs[:1])]
        if shapes != [*_decoder_inputs(decoder, name), first]:
            raise TangoError(
                f"{file}: decoder and prompt: vocabulary do not fit the tensors of graphs: {name}", _RESTORE
            )
        if graph.device and tables != [(decoder.hidden_size,)]:  # decoding reads its rows, too
            problem = f"{name} has a device graph, embed has none that takes its table"
            raise TangoError(f"{file}: graphs: {problem}", _RESTORE)


def _decoder_inputs(decoder: DecoderSpec, name: GraphName) -> list[tuple[int | str, ...]]:
    """The shapes that a graph of the decoder takes."""
    low = decoder.inner.layer if decoder.inner else 0
    layers = {"decoder": decoder.layers, "decoder_low": low, "decoder_high": decoder.layers - low}[name]
    shapes: list[tuple[int | str, ...]] = [("N", decoder.hidden_size), ("N",)]
    if name == "decoder_high":  # rotary positions that are no places in the cache
        shapes.append(("N",))
    if decoder.rotary:
        shapes.append((3, "N"))
    return shapes + [(decoder.kv_heads, "P", decoder.head_dim)] * (2 * layers)


def _check_weights(manifest: Manifest, name: GraphName, where: str) -> None:
    """Refuses weights that the device graph takes in another form, or that the data file cannot hold."""
    graph = manifest.graphs[name]
    weights = graph.weights or {}
    # The device graph's other inputs are the graph's own, but for the decoder's positions: it takes the last one alone.
    for tensor in graph.device.inputs[len(graph.inputs) :] if graph.device else ():
        weight = weights.get(tensor.name)
        if weight is None:
            raise TangoError(f"{where}: weights has no {tensor.name!r}, which device: inputs takes", _RESTORE)
        if (weight.dtype, weight.shape) != (tensor.dtype, tensor.shape):
            raise TangoError(f"{where}: weights: {tensor.name} is not what device: inputs takes", _RESTORE)
    size = manifest.files[graph.data].size if graph.data in manifest.files else 0
    for key, weight in weights.items():
        inside = 0 <= weight.offset <= weight.end <= size and min(weight.shape, default=1) >= 0
        if not inside or weight.offset % WEIGHT_ALIGNMENT:
            raise TangoError(f"{where}: weights: {key} is not inside {graph.data}, of {size} bytes", _RESTORE)
        _check_quantization(weight, weights, f"{where}: weights: {key}")


def _check_quantization(weight: WeightSpec, weights: dict[str, WeightSpec], where: str) -> None:
    found = weight.quantization
    if found is None:
        return
    if found.group_size < 0:
        raise TangoError(f"{where}: quantization: group_size is {found.group_size}", _RESTORE)
    for name in (found.scales, found.zero_points):
        if name is not None and name not in weights:
            raise TangoError(f"{where}: quantization: weights has no {name!r}", _RESTORE)
