"""bundle.json: everything about a bundle, as dataclasses.

The dataclasses are the schema: a field is a key, its annotation is its type, and reading checks both.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, get_args

import numpy as np

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.util.files import is_plain_name, require_links_inside, require_utf8
from tango_runtime.util.jsonschema import Range, from_json, parse_json, shown

#: Version of this schema. A bundle of another format is refused with the command that exports it again.
FORMAT = 4
MANIFEST = "bundle.json"

#: Weights begin at multiples of this many bytes in a graph's data file, so that kernels use them where the file was
#: mapped or copied to: cudaMalloc aligns as much, and kernels for matrices read whole lines of it.
WEIGHT_ALIGNMENT = 256

#: A decoder that drops tokens on its way is two graphs, ``decoder_low`` and ``decoder_high``, in place of ``decoder``.
GraphName = Literal["vision", "prune", "embed", "decoder", "decoder_low", "decoder_high"]
GRAPHS: tuple[GraphName, ...] = get_args(GraphName)

#: ``device``: in the CUDA library's operators, with weights as inputs. ``portable``: in standard ones.
GraphForm = Literal["portable", "device"]
Runtime = Literal["onnxruntime", "tensorrt"]
DType = Literal["float16", "float32", "float8_e4m3fn", "int32", "int64", "int8", "uint8"]
Precision = Literal["int8", "fp8", "int4"]

# A bundle may come from a stranger: no number of it goes unbounded into the size of an array or an integer of C.
Whole = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[int, Range(1, 2**31 - 1)]
Signed = Annotated[int, Range(-(2**31), 2**31 - 1)]
Bytes = Annotated[int, Range(0, 2**63 - 1)]

#: What the graphs were defined by: parts of the model, and their settings in the words of config.json.
Config = dict[str, dict[str, Whole | float | bool | str | list[Whole]]]

_RESTORE = "export the bundle again, or undo the edit"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: Its name in the graph.
        dtype: NumPy name of the element type.
        shape: An integer, or the name of a dynamic axis: ``F`` steps of frames, ``N`` tokens, ``P`` cached tokens,
            ``S`` cached and new ones, ``K`` kept tokens, ``H`` and ``W`` pixels, ``L`` tokens of one step of frames.
    """

    name: str
    dtype: DType
    shape: tuple[Whole | str, ...]


@dataclass(frozen=True)
class WeightQuantization:
    """How the elements of a quantized weight are read: ``scale · (q − zero point)``, group by group.

    Attributes:
        bits: Bits of one element; 4-bit elements are packed in pairs, the first in the lower half of a byte.
        group_size: Number of consecutive input channels that share a scale; 0 if each output channel has one scale, or
            all of them one where ``scales`` has no axis.
        scales: Name of the weight that holds the scales.
        zero_points: Name of the weight that holds the zero points; None if each is the middle of the range:
            2^(bits − 1) for unsigned elements, otherwise 0.
    """

    bits: Literal[4, 8]
    group_size: Whole
    scales: str
    zero_points: str | None = None


@dataclass(frozen=True)
class WeightSpec:
    """Where a weight is stored.

    Attributes:
        dtype: NumPy name of the element type as stored; packed integers are ``uint8``.
        shape: Its shape as stored.
        offset: Its first byte in the data file, a multiple of ``WEIGHT_ALIGNMENT``.
        quantization: How its elements are read; None if they are plain numbers.
    """

    dtype: DType
    shape: tuple[Whole, ...]
    offset: Bytes
    quantization: WeightQuantization | None = None

    @property
    def end(self) -> int:
        """The byte after its last."""
        size = 1 if self.dtype == "float8_e4m3fn" else np.dtype(self.dtype).itemsize  # NumPy does not know it
        return self.offset + math.prod(self.shape) * size


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a graph were quantized.

    Attributes:
        precision: ``int8``: weights and activations, as QuantizeLinear and DequantizeLinear; ``fp8``: the same in E4M3,
            for TensorRT 10 and later, and where there is a device graph for ONNX Runtime on a GPU of compute capability
            8.9 or later; ``int4``: weights only, in blocks, as ONNX Runtime's MatMulNBits.
        clips: Number of videos that were observed; 0 where weights were rounded without any, or the checkpoint was
            quantized already.
        excluded: Layers that would lose too much, or whose widths the precision does not take. They keep the bundle's
            dtype, or have 8-bit weights in an ``int4`` graph.
    """

    precision: Precision
    clips: Whole
    excluded: tuple[str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph.

    Attributes:
        file: The graph's file, relative to the bundle.
        opset: Its ONNX opset.
        runtimes: The libraries that can run it.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        quantization: How its linear layers were quantized; None if they have the bundle's dtype.
        device: The same graph for a GPU, in fused operators and with weights as inputs; None if there is none.
        weights: Where each weight is in the graph's data file. The device graph takes those that it names as inputs,
            after its other inputs. None if only the graph knows its weights.
        tensorrt: File of the same graph in a form that TensorRT fuses, on the same data file; None if TensorRT fuses
            the graph as it is.
    """

    file: str
    opset: Positive
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

    @property
    def device_inputs(self) -> tuple[TensorSpec, ...]:
        """The device graph's inputs that are no weights."""
        inputs = self.device.inputs if self.device else ()
        return tuple(tensor for tensor in inputs if tensor.name not in (self.weights or {}))


@dataclass(frozen=True)
class FileSpec:
    """A file of the bundle.

    Attributes:
        size: Its size in bytes.
        sha256: The SHA-256 of its content, in hexadecimal.
    """

    size: Bytes
    sha256: str


@dataclass(frozen=True)
class PixelBudget:
    """The size of frames that keep their aspect ratio.

    Attributes:
        factor: Height and width are multiples of this many pixels.
        min_pixels: Minimum number of pixels of a frame.
        max_pixels: Maximum number of pixels of a frame.
        total_pixels: Maximum number of pixels of all frames together.
    """

    factor: Positive
    min_pixels: Positive
    max_pixels: Positive
    total_pixels: Positive


@dataclass(frozen=True)
class VideoSpec:
    """How a video becomes the frames that the vision graph takes.

    Attributes:
        frames: Number of frames sampled unless the caller asks for another.
        size: (height, width) in pixels that every frame is resized to; with a ``budget``, the default that engines are
            built for.
        resample: The filter that resizes frames.
        tokens_per_frame: Tokens L that the vision graph returns for one step of frames of that size.
        frames_per_step: Consecutive frames that the vision graph takes as one step.
        sampling: How the indices ``linspace(0, n − 1, F)`` become integers; ``nearest`` rounds halves to even.
        budget: Set where a frame keeps its aspect ratio; None where every frame has ``size``.
    """

    frames: Positive
    size: tuple[Positive, Positive]
    resample: Literal["bicubic"]
    tokens_per_frame: Positive
    frames_per_step: Literal[1, 2]
    sampling: Literal["floor", "nearest"]
    budget: PixelBudget | None = None

    def steps(self, frames: int) -> int:
        """Number of steps of a number of frames. The vision graph takes steps, and the operator prunes them."""
        return -(-frames // self.frames_per_step)

    def step_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of one step of frames of a size (height, width)."""
        if self.budget is None:
            return self.tokens_per_frame
        return (size[0] // self.budget.factor) * (size[1] // self.budget.factor)

    def total_tokens(self, frames: int) -> int:
        """Number of video tokens F·L of a number of frames at the default size."""
        return self.steps(frames) * self.tokens_per_frame


@dataclass(frozen=True)
class PromptSpec:
    """How a question becomes token ids around the video.

    Attributes:
        placeholder: The text that stands for the video in the rendered chat template.
        after_video: Rows of the embedding graph that follow the video's tokens (LLaVA-OneVision's newline).
        stop: Token ids that end an answer.
        vocabulary: Number of ids that may be sampled, counted from 0.
        row_end: Row of the embedding graph that follows each grid row with a kept token (LLaVA-Video's newline); None
            if there is none.
        video_text: Text between the video and the question, a format string over ``duration`` (seconds), ``frames``
            (their number) and ``times`` (``0.00s,1.00s,…``); None if there is none.
    """

    placeholder: str
    after_video: tuple[Whole, ...]
    stop: tuple[Whole, ...]
    vocabulary: Positive
    row_end: Whole | None = None
    video_text: str | None = None


@dataclass(frozen=True)
class RotarySpec:
    """Rotary positions on three axes (time, row, column), as in Qwen2.5-VL.

    A decoder with them has one more input, ``rotary`` [3, N] int64, beside the cache slots in ``positions`` [N].

    Attributes:
        sections: Number of frequencies of each axis; their sum is half of ``head_dim``.
        time_step: ``seconds``: time ids follow the clip's clock; ``unit``: two ids per step, as in the code of Tango's
            authors.
        tokens_per_second: Time ids per second.
        positions: Number of ids of an axis that the decoder was made for, counted from 0.
    """

    sections: tuple[Whole, Whole, Whole]
    time_step: Literal["seconds", "unit"]
    tokens_per_second: Positive
    positions: Positive


@dataclass(frozen=True)
class VisionSpec:
    """Dimensions of the vision tower and its projector. Memory and time are estimated from them.

    Attributes:
        layers: Transformer layers.
        hidden_size: Width of the tower.
        intermediate_size: Width of its MLP.
        heads: Attention heads.
        patches: Number of patches of one step of frames at the default size.
        projector: Number of weights in the projector's linear layers that run on each patch, and in those that run on
            each token.
        mlp: ``gated`` if the MLP has a third linear layer, the gate.
        global_layers: Number of layers that attend to all patches of a step; None if all do.
        window: Patches of an attention window in the other layers.
    """

    layers: Positive
    hidden_size: Positive
    intermediate_size: Positive
    heads: Positive
    patches: Positive
    projector: tuple[Bytes, Bytes]
    mlp: Literal["plain", "gated"]
    global_layers: Whole | None = None
    window: Positive | None = None


@dataclass(frozen=True)
class InnerPruning:
    """Inner pruning: a decoder that drops some of the video's rows between two of its layers.

    Attributes:
        layer: The first layer that runs without them, counted from 0. The layers before it are the graph
            ``decoder_low``.
        ratio: Share of the video's rows that stay. Row ends count as rows.
    """

    layer: Positive
    ratio: float

    def kept(self, rows: int) -> int:
        """Number of the video's rows that stay, rounded to the nearest integer, halves to even."""
        return round(rows * self.ratio)

    def share(self, layers: int) -> float:
        """Share of the video's rows that a layer sees, averaged over the decoder's layers."""
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
        context: Maximum number of positions, prompt and answer together.
        norm_eps: The ε of its norms.
        rotary: Its positions on three axes; None if a token's position is its cache slot.
        inner: Its inner pruning; None if every layer sees all rows of the video.
    """

    layers: Positive
    hidden_size: Positive
    intermediate_size: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    context: Annotated[int, Range(1, 2**20)]
    norm_eps: Annotated[float, Range(0, 1)]
    rotary: RotarySpec | None = None
    inner: InnerPruning | None = None


@dataclass(frozen=True)
class Source:
    """Where a bundle came from.

    Attributes:
        checkpoint: Folder or hub id of the Video LLM.
        exporter: Name and version of the program that wrote the bundle.
        salience: Folder or hub id of the checkpoint whose pooling head gives the salience; None if the Video LLM itself
            gives it.
    """

    checkpoint: str
    exporter: str
    salience: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of bundle.json.

    Attributes:
        format: Version of this schema.
        family: The model family, as ``tango-export --model`` names it.
        dtype: Element type of the weights and features.
        video: How a video becomes frames.
        prompt: How a question becomes token ids.
        vision: The vision tower's dimensions.
        decoder: The decoder's dimensions.
        config: The model's dimensions in the words of config.json; calibration defines the graphs again from them.
        prune: The operator's attributes, attention sinks included.
        graphs: Every graph by name.
        files: Every other file of the bundle by name.
        source: Where the bundle came from.
    """

    format: int
    family: str
    dtype: Literal["float16", "float32"]
    video: VideoSpec
    prompt: PromptSpec
    vision: VisionSpec
    decoder: DecoderSpec
    config: Config
    prune: dict[str, Signed | str | list[Whole]]
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

    def precision(self, name: GraphName) -> str:
        """A graph's :class:`Precision`, or the bundle's dtype if it is not quantized."""
        quantization = self.graphs[name].quantization
        return quantization.precision if quantization else self.dtype

    def graph_files(self, name: GraphName) -> tuple[str, ...]:
        """Every file of a graph: its ONNX files, and its weights where it has any."""
        graph = self.graphs[name]
        return (*self._with_data(name, graph.file), *graph.files[1:])

    def engine_files(self, name: GraphName, form: GraphForm = "portable") -> tuple[str, ...]:
        """The files that TensorRT builds a graph's engine from: of a device graph, no weights."""
        graph = self.graphs[name]
        if form == "device":
            return graph.device.files if graph.device else ()
        return self._with_data(name, graph.tensorrt or graph.file)

    def _with_data(self, name: GraphName, file: str) -> tuple[str, ...]:
        data = self.graphs[name].data
        return (file, data) if data in self.files else (file,)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes bundle.json, last of a bundle's files; a key whose value is None is left out.

    Raises:
        TangoError: No command could open what was written: it contradicts the schema or itself.
    """
    data = asdict(manifest, dict_factory=lambda items: {key: value for key, value in items if value is not None})
    (folder / MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    read_manifest(folder)


def read_manifest(path: Path) -> Manifest:
    """Reads and checks the bundle.json of a folder.

    Raises:
        TangoError: There is none, it is not JSON, has another format, or contradicts the schema or itself.
    """
    file = path / MANIFEST
    require_utf8(path)
    if not path.is_dir():
        raise TangoError(f"there is no bundle at {path}", "make one: tango-export --model llava-ov --output FOLDER")
    if not file.is_file():
        raise TangoError(f"{path} holds no {MANIFEST}", "name a folder that tango-export made")
    require_links_inside(path)
    data = parse_json(file.read_bytes(), str(file), "copy the bundle again, or export it again")
    if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
        found, newer = data["format"], isinstance(data["format"], int) and data["format"] > FORMAT
        hint = "install the tango-edge that made it, or a newer one" if newer else _export_again(data)
        raise TangoError(f"{file} has format {shown(found)}, this tango-edge reads {FORMAT}", hint)
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
    """Rejects a bundle that lacks a graph, or has one that it does not need."""
    wanted = {"vision", "prune", "embed", *manifest.decoders}
    for name in sorted(wanted.symmetric_difference(manifest.graphs)):
        problem = "has no" if name in wanted else "needs no"
        raise TangoError(f"{file}: graphs {problem} {name!r}", _RESTORE)


def _check_names(manifest: Manifest, file: Path) -> None:
    """Rejects names that are not those of files in the bundle's folder."""
    graphs = [name for graph in manifest.graphs.values() for name in graph.files]
    for name in (*manifest.files, *graphs):
        if not is_plain_name(name) or name == MANIFEST:
            raise TangoError(f"{file}: files: {name!r} is not a name inside of the bundle", _RESTORE)
    for name in graphs:
        if not name.endswith(".onnx"):  # ONNX Runtime reads .ort as another format
            raise TangoError(f"{file}: graphs: {name!r} is not the name of an ONNX file", _RESTORE)


def _check_video_text(text: str, file: Path) -> None:
    """Rejects what is no format string over what is known of a video."""
    try:
        for _, name, form, conversion in Formatter().parse(text):
            if name not in (None, "duration", "frames", "times"):
                raise TangoError(f"{file}: prompt: video_text has an unknown field {name!r}", _RESTORE)
            if form not in (None, "", ".2f") or conversion:  # a width could fill the memory
                raise TangoError(f"{file}: prompt: video_text has a field of the form {form!r}", _RESTORE)
        text.format(duration=0.0, frames=0, times="")
    except ValueError as error:
        raise TangoError(f"{file}: prompt: video_text is no format string: {error}", _RESTORE) from error


def _check_dimensions(manifest: Manifest, file: Path) -> None:
    """Rejects dimensions that contradict one another here, and not in the middle of an answer."""
    decoder, inner = manifest.decoder, manifest.decoder.inner
    if inner and not (0 < inner.layer < decoder.layers and 0 < inner.ratio <= 1):
        raise TangoError(f"{file}: decoder: inner is out of range", _RESTORE)
    (rows, columns), tokens = manifest.params.grid, manifest.video.tokens_per_frame
    if rows * columns != tokens:
        raise TangoError(
            f"{file}: prune: a grid of {rows}x{columns} does not hold video: tokens_per_frame {tokens}", _RESTORE
        )
    _check_vision(manifest, file)
    if decoder.layers > sum(len(manifest.graphs[name].inputs) for name in manifest.decoders):
        raise TangoError(
            f"{file}: decoder: {decoder.layers} layers do not fit the tensors of graphs: decoder", _RESTORE
        )
    if decoder.rotary and 2 * sum(decoder.rotary.sections) != decoder.head_dim:
        raise TangoError(f"{file}: decoder: rotary: sections do not fit head_dim {decoder.head_dim}", _RESTORE)
    budget, size = manifest.video.budget, manifest.video.size
    if budget is not None and size != (rows * budget.factor, columns * budget.factor):
        raise TangoError(
            f"{file}: video: size {size[0]}x{size[1]} does not hold a grid of {rows}x{columns} tokens of "
            f"{budget.factor} pixels",
            _RESTORE,
        )
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
    _check_rows(manifest, file)


def _check_vision(manifest: Manifest, file: Path) -> None:
    """Rejects frames of another size than the vision graph takes, and other tokens than it gives."""
    video, graph = manifest.video, manifest.graphs["vision"]
    frames, tokens = ("F", *video.size, 3), ("F", video.tokens_per_frame, manifest.decoder.hidden_size)
    found = [tensor.shape for tensor in (*graph.inputs[:1], *graph.outputs[:1])]
    if video.budget is None and video.frames_per_step == 1 and found != [frames, tokens]:
        raise TangoError(f"{file}: video and decoder do not fit the tensors of graphs: vision", _RESTORE)


def _check_rows(manifest: Manifest, file: Path) -> None:
    """Rejects rows that the embedding's table does not have, where bundle.json says how many those are."""
    prompt = manifest.prompt
    asked = {"after_video": prompt.after_video, "row_end": () if prompt.row_end is None else (prompt.row_end,)}
    for table in manifest.graphs["embed"].device_weights.values():
        count = next(iter(table.shape), 0)
        for key, rows in asked.items():
            if max(rows, default=-1) >= count:
                raise TangoError(f"{file}: prompt: {key} is not in the table of {count} rows", _RESTORE)


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
    """Rejects weights that the device graph takes in another form, or that the data file cannot hold."""
    graph = manifest.graphs[name]
    weights = graph.weights or {}
    if graph.device and graph.device.device:
        raise TangoError(f"{where}: device has a device graph of its own", _RESTORE)
    # The device graph's other inputs are the graph's own, but for the decoder's positions: it takes the last one alone.
    for tensor in graph.device.inputs[len(graph.inputs) :] if graph.device else ():
        weight = weights.get(tensor.name)
        if weight is None:
            raise TangoError(f"{where}: weights has no {tensor.name!r}, which device: inputs takes", _RESTORE)
        if (weight.dtype, weight.shape) != (tensor.dtype, tensor.shape):
            raise TangoError(f"{where}: weights: {tensor.name} is not what device: inputs takes", _RESTORE)
    size = manifest.files[graph.data].size if graph.data in manifest.files else 0
    for key, weight in weights.items():
        if weight.end > size or weight.offset % WEIGHT_ALIGNMENT:
            raise TangoError(f"{where}: weights: {key} is not inside {graph.data}, of {size} bytes", _RESTORE)
        _check_quantization(weight, weights, f"{where}: weights: {key}")


def _check_quantization(weight: WeightSpec, weights: dict[str, WeightSpec], where: str) -> None:
    found = weight.quantization
    if found is None:
        return
    for name in (found.scales, found.zero_points):
        if name is not None and name not in weights:
            raise TangoError(f"{where}: quantization: weights has no {name!r}", _RESTORE)
