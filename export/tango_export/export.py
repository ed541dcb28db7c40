"""A checkpoint becomes a bundle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tango_export.families import FAMILIES, Family, Model, Preset
from tango_export.graph import DEVICE, PORTABLE, TENSORRT, Form, Graph, build
from tango_export.graph.builder import Float
from tango_export.graph.files import write_device, write_portable, write_prune, write_tensorrt
from tango_plugins import PruneParams, TangoError, op
from tango_plugins.params import Budget
from tango_plugins.version import package_version
from tango_runtime.bundle import (
    FORMAT,
    MANIFEST,
    FileSpec,
    GraphName,
    GraphSpec,
    InnerPruning,
    Manifest,
    Quantization,
    Source,
    describe,
    write_manifest,
)
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.util.console import progress, status
from tango_runtime.util.errors import first_line
from tango_runtime.util.files import check_output, require_space, staged_folder
from tango_runtime.video.shape import at_size, default_size, with_max_pixels

DTYPES: dict[str, Float] = {"fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        model: A family, or one of its published checkpoints.
        checkpoint: Folder or hub id in place of the published one.
        salience: Folder or hub id of the checkpoint whose pooling head gives the salience, in place of the published.
        output: Folder of the bundle; by default one named after the checkpoint.
        dtype: ``fp16`` or ``fp32``. fp16 bundles also have device graphs.
        retention_ratio: Fraction of the video's tokens kept, r.
        budget: How many tokens that is; see :class:`tango_plugins.PruneParams`.
        frames: Frames sampled from a video; None takes the family's number.
        context: Most positions, prompt and answer together; None takes the family's number.
        sink_positions: Grid positions whose salience is an artifact of the tower; None takes the family's.
        inner: Which of the video's rows the decoder drops on its way; None for none.
        frame: (height, width) in pixels that engines are built for, where frames may have any size; None takes what
            16:9 gives within the budget of pixels.
        max_pixels: Most pixels of a frame, where they may have any size; None takes the family's.
        time_step: What the rotary positions of time follow, where the decoder has some: ``seconds`` or ``unit``; None
            takes the family's, ``seconds``.
        overwrite: Replace an output that exists.
    """

    model: str = "llava-ov"
    checkpoint: str | None = None
    salience: str | None = None
    output: Path | None = None
    dtype: str = "fp16"
    retention_ratio: float = 0.10
    budget: Budget = "paper"
    frames: int | None = None
    context: int | None = None
    sink_positions: tuple[int, ...] | None = None
    inner: InnerPruning | None = None
    frame: tuple[int, int] | None = None
    max_pixels: int | None = None
    time_step: Literal["seconds", "unit"] | None = None
    overwrite: bool = False


def export(request: Request) -> Path:
    """Writes a bundle.

    Returns:
        The bundle's folder.

    Raises:
        TangoError: The request, the checkpoint or the disk is at fault; nothing is left half-written.
    """
    family, preset = find_preset(request.model)
    if request.salience is not None and preset.salience is None:
        raise TangoError(
            f"{family.name} takes its salience from its own tower", "leave --salience-checkpoint out, or name --model"
        )
    salience = request.salience if request.salience is not None else preset.salience
    source = Source(
        checkpoint=_lasting(preset.checkpoint if request.checkpoint is None else request.checkpoint),
        exporter=f"tango-edge {package_version()}",
        salience=None if salience is None else _lasting(salience),
    )
    output = request.output or Path(Path(request.checkpoint).name if request.checkpoint else preset.bundle)
    _check(request, output)
    context = family.context if request.context is None else request.context
    model = open_model(family, source.checkpoint, source.salience, context, request.inner)
    model = _as_asked(request, model)
    params = _params(request, model)
    Prompt(model.tokenizer, model.chat_template, model.prompt.placeholder)  # rejects a broken template
    with staged_folder(output, holding=MANIFEST, overwrite=request.overwrite) as folder:
        graphs = _write_graphs(folder, model, params, DTYPES[request.dtype])
        (folder / "tokenizer.json").write_text(model.tokenizer, encoding="utf-8")
        (folder / "chat_template.jinja").write_text(model.chat_template, encoding="utf-8")
        manifest = Manifest(
            format=FORMAT,
            family=family.name,
            dtype=DTYPES[request.dtype],
            video=model.video,
            prompt=model.prompt,
            vision=model.vision,
            decoder=model.decoder,
            config=model.config,
            prune=op.attributes(params),
            graphs=graphs,
            files=_describe_files(folder),
            source=source,
        )
        write_manifest(folder, manifest)
    return output


def find_preset(name: str) -> tuple[Family, Preset]:
    """The family and published checkpoint that ``--model`` names.

    Raises:
        TangoError: There is none of that name.
    """
    for family in FAMILIES.values():
        if name in family.presets:
            return family, family.presets[name]
    raise TangoError(f"there is no model {name!r}", f"known are {', '.join(known_models())}")


def known_models() -> list[str]:
    """What ``--model`` may name: every family and its published checkpoints."""
    return [name for family in FAMILIES.values() for name in family.presets]


def open_model(
    family: Family, checkpoint: str, salience: str | None, context: int, inner: InnerPruning | None = None
) -> Model:
    """Opens a checkpoint and the source of its salience, from folders or from the hub."""
    named = {"checkpoint": checkpoint, "salience": salience}
    return family.load({role: fetch(where) for role, where in named.items() if where is not None}, context, inner)


def fetch(where: str) -> Path:
    """A checkpoint's folder: the one named, or the hub's, downloaded or found in its cache.

    Raises:
        TangoError: There is no such folder, and the hub does not give it.
    """
    folder = _folder(where)
    if folder.is_dir():
        if not (folder / "config.json").is_file():  # now, not after the download of the other checkpoint
            raise TangoError(f"{folder} has no config.json", "name a folder in the format of the Hugging Face hub")
        return folder
    if not _is_hub_id(where):
        raise TangoError(
            f"there is no checkpoint folder {where}", "name a local folder, or an id on the hub (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                where, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"], ignore_patterns=["onnx/*"]
            )
        )
    except Exception as error:  # the hub's and its transport's have no common class
        raise TangoError(
            f"the hub did not give {where}: {first_line(error)}",
            "check the id and the network, or download it and name the folder (--checkpoint, --salience-checkpoint)",
        ) from error


def _lasting(where: str) -> str:
    """A folder as its absolute path, so that `tango validate` finds it from anywhere; a hub id as it is."""
    folder = _folder(where)
    return str(folder.absolute()) if folder.is_dir() else where


def _folder(where: str) -> Path:
    """A path with the user's home folder in the place of ``~``; as it is where there is no such user."""
    return Path(os.path.expanduser(where))  # noqa: PTH111  # Path.expanduser raises where there is none


def _is_hub_id(where: str) -> bool:
    owner, slash, name = where.partition("/")
    return bool(slash and owner and name) and "/" not in name and not where.startswith((".", "~"))


def _check(request: Request, output: Path) -> None:
    """Rejects what can be rejected before anything is downloaded."""
    check_output(output, holding=MANIFEST, overwrite=request.overwrite)
    if request.frames is not None and request.frames < 1:
        raise TangoError(f"--frames is {request.frames}", "a video needs at least one frame")
    PruneParams(retention_ratio=request.retention_ratio, budget=request.budget)
    if request.inner and not 0 < request.inner.ratio <= 1:
        raise TangoError(f"--inner-ratio is {request.inner.ratio}", "it must be above 0 and at most 1")


def _as_asked(request: Request, model: Model) -> Model:
    """The model with what was asked of its frames and positions."""
    video, decoder = model.video, model.decoder
    if request.frames is not None:
        video = replace(video, frames=request.frames)
    if request.max_pixels is not None:
        video = with_max_pixels(video, request.max_pixels)
    size = request.frame or default_size(video)
    video, vision, params = at_size(video, model.vision, model.params, size)
    if request.time_step is not None:
        if decoder.rotary is None:
            raise TangoError("--time-step is given, and this decoder has one position a token", "leave it out")
        decoder = replace(decoder, rotary=replace(decoder.rotary, time_step=request.time_step))
    return replace(model, video=video, vision=vision, params=params, decoder=decoder)


def _params(request: Request, model: Model) -> PruneParams:
    """The operator's parameters: the model's, but for what was asked for."""
    params = replace(model.params, retention_ratio=request.retention_ratio, budget=request.budget)
    return params if request.sink_positions is None else replace(params, sink_positions=request.sink_positions)


def _write_graphs(folder: Path, model: Model, params: PruneParams, dtype: Float) -> dict[GraphName, GraphSpec]:
    portable = [build(definition, _form(PORTABLE, model), dtype) for definition in model.definitions]
    total = sum(weight.bytes for graph in portable for weight in graph.weights)
    require_space(folder, total)
    specs: dict[GraphName, GraphSpec] = {}
    with progress("export", total, size=True) as on_progress:
        for graph in portable:
            specs[graph.name] = _quantized(graph, write_portable(graph, model.read, folder, on_progress))
    if dtype == "float16":
        for definition, graph in zip(model.definitions, portable, strict=True):
            fusible = build(definition, _form(TENSORRT, model), dtype)
            if fusible.nodes != graph.nodes:
                specs[graph.name] = write_tensorrt(fusible, specs[graph.name], folder)
        specs |= write_device_graphs(folder, model, specs, dtype)
    return specs | {"prune": write_prune(params, specs["vision"].outputs[0], folder)}


def write_device_graphs(
    folder: Path, model: Model, specs: Mapping[GraphName, GraphSpec], dtype: Float
) -> dict[GraphName, GraphSpec]:
    """Writes the device form of every graph that has one; returns the graphs' entries in bundle.json."""
    found = {}
    for definition in model.definitions:
        if definition.no_device_form is None:
            graph = build(definition, _form(DEVICE, model), dtype)
            found[definition.name] = write_device(graph, specs[definition.name], model.read, folder)
        else:
            status(f"{definition.name} has no device graph: {definition.no_device_form}")
    return found


def _form(base: Form, model: Model) -> Form:
    """A form of the model's graphs, with the layers that its checkpoint stores in 4 bits as they are."""
    return model.packed.form(base) if model.packed else base


def _quantized(graph: Graph, spec: GraphSpec) -> GraphSpec:
    """The entry in bundle.json of a graph, some of whose layers may be in blocks."""
    names = {weight.name.rpartition(".")[0] for weight in graph.weights if weight.quantization}
    if not names:
        return spec
    others = tuple(layer.name for layer in graph.linears if layer.weight not in names)
    return replace(spec, runtimes=("onnxruntime",), quantization=Quantization("int4", 0, others))


def _describe_files(folder: Path) -> dict[str, FileSpec]:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    described = {}
    with progress("hash", sum(file.stat().st_size for file in files), size=True) as on_progress:
        for file in files:
            described[file.name] = describe(file)
            on_progress(described[file.name].size)
    return described
