"""A checkpoint becomes a bundle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from tango_export.families import FAMILIES, Family, Model, Preset
from tango_export.fused import is_fusible, write_fused_graph
from tango_export.graphs import write_graph, write_prune_graph
from tango_plugins import PruneParams, TangoError, op
from tango_plugins.params import Budget
from tango_runtime.bundle import (
    FORMAT,
    MANIFEST,
    FileSpec,
    GraphName,
    GraphSpec,
    Manifest,
    PromptSpec,
    Source,
    VideoSpec,
    describe,
    write_manifest,
)
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.util.console import progress
from tango_runtime.util.errors import first_line
from tango_runtime.util.files import check_output, require_space, staged_folder

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        model: A family, or one of its published checkpoints.
        checkpoint: Folder or hub id in place of the published one.
        siglip: Folder or hub id of the SigLIP with the pooling head, in place of the published one.
        output: Where the bundle will stand; by default a folder named after the checkpoint.
        dtype: ``fp16`` or ``fp32``.
        retention_ratio: Fraction of the video's tokens kept, r.
        budget: How many tokens that is; see :class:`tango_plugins.PruneParams`.
        frames: Frames sampled from a video.
        context: Most positions, prompt and answer together.
        sink_positions: Grid positions whose salience is an artefact of the tower; None leaves it to the operator's
            rule, which knows the released SigLIP's.
        fused: Also write the graphs in ONNX Runtime's fused operators, for its CUDA provider.
        overwrite: Replace an output that exists.
    """

    model: str = "llava-ov"
    checkpoint: str | None = None
    siglip: str | None = None
    output: Path | None = None
    dtype: str = "fp16"
    retention_ratio: float = 0.10
    budget: Budget = "paper"
    frames: int = 32
    context: int = 8192
    sink_positions: tuple[int, ...] | None = None
    fused: bool = False
    overwrite: bool = False


def export(request: Request) -> Path:
    """Writes a bundle.

    Returns:
        The bundle's folder.

    Raises:
        TangoError: The request or the checkpoint is at fault, or the disk; nothing is left half-written.
    """
    family, preset = find_preset(request.model)
    source = Source(
        checkpoint=_lasting(preset.checkpoint if request.checkpoint is None else request.checkpoint),
        exporter=f"tango-edge {version('tango-edge')}",
        salience=_lasting(preset.siglip if request.siglip is None else request.siglip),
    )
    output = request.output or Path(Path(request.checkpoint).name if request.checkpoint else preset.bundle)
    _check(request, output)
    model = open_model(family, source.checkpoint, source.salience or "", DTYPES[request.dtype], request.context)
    params = _params(request, model)
    with staged_folder(output, holding=MANIFEST, overwrite=request.overwrite) as folder:
        graphs = _write_graphs(folder, model, params, request.fused)
        (folder / "tokenizer.json").write_text(model.tokenizer, encoding="utf-8")
        (folder / "chat_template.jinja").write_text(model.chat_template, encoding="utf-8")
        Prompt(folder / "tokenizer.json", model.chat_template, model.placeholder)  # refuses a template that is broken
        write_manifest(folder, _manifest(request, family, model, source, graphs, _describe_files(folder)))
    return output


def find_preset(name: str) -> tuple[Family, Preset]:
    """The family and published checkpoint that ``--model`` names.

    Raises:
        TangoError: There is none of that name.
    """
    for family in FAMILIES.values():
        if name in family.presets:
            return family, family.presets[name]
    known = ", ".join(name for family in FAMILIES.values() for name in family.presets)
    raise TangoError(f"there is no model {name!r}", f"known are {known}")


def open_model(family: Family, checkpoint: str, siglip: str, dtype: torch.dtype, context: int) -> Model:
    """Opens a checkpoint and its SigLIP, from folders or from the hub."""
    return family.load(fetch(checkpoint), fetch(siglip), dtype, context)


def fetch(where: str) -> Path:
    """A checkpoint's folder: the one named, or the hub's, downloaded or found in its cache.

    Raises:
        TangoError: There is no such folder, and the hub does not give it.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
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
            "check the id and the network, or download it elsewhere and name the folder (--checkpoint, --siglip)",
        ) from error


def _lasting(where: str) -> str:
    """A folder as its absolute path, so that `tango validate` finds it from anywhere; a hub id as it is."""
    folder = Path(where).expanduser()
    return str(folder.absolute()) if folder.is_dir() else where


def _is_hub_id(where: str) -> bool:
    owner, slash, name = where.partition("/")
    return bool(slash and owner and name) and "/" not in name and not where.startswith((".", "~"))


def _check(request: Request, output: Path) -> None:
    """Refuses what can be refused before anything is downloaded."""
    check_output(output, holding=MANIFEST, overwrite=request.overwrite)
    if request.frames < 1:
        raise TangoError(f"--frames is {request.frames}", "a video needs at least one frame")
    if request.fused and request.dtype != "fp16":
        raise TangoError(f"--fused with --dtype {request.dtype}", "ONNX Runtime's fused attention is for fp16")
    PruneParams(retention_ratio=request.retention_ratio, budget=request.budget)


def _params(request: Request, model: Model) -> PruneParams:
    """The operator's parameters: the model's, but for what was asked for."""
    params = replace(model.params, retention_ratio=request.retention_ratio, budget=request.budget)
    return params if request.sink_positions is None else replace(params, sink_positions=request.sink_positions)


def _write_graphs(folder: Path, model: Model, params: PruneParams, fused: bool) -> dict[GraphName, GraphSpec]:
    fusing = model.graphs if fused else ()
    for graph in fusing:
        if not is_fusible(graph):
            raise TangoError(f"{graph.name} cannot be fused: a width is no multiple of 16", "leave --fused out")
    total = sum(graph.weight_bytes for graph in model.graphs)
    require_space(folder, total)
    with progress("export", total, size=True) as on_progress:
        for graph in model.graphs:
            write_graph(graph, folder, on_progress)
    specs: dict[GraphName, GraphSpec] = {graph.name: graph.spec for graph in model.graphs}
    for graph in fusing:
        specs[graph.name] = write_fused_graph(graph, folder, model.decoder.context)
    return specs | {"prune": write_prune_graph(params, specs["vision"].outputs[0], folder)}


def _describe_files(folder: Path) -> dict[str, FileSpec]:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    described = {}
    with progress("hash", sum(file.stat().st_size for file in files), size=True) as on_progress:
        for file in files:
            described[file.name] = describe(file)
            on_progress(described[file.name].size)
    return described


def _manifest(
    request: Request,
    family: Family,
    model: Model,
    source: Source,
    graphs: dict[GraphName, GraphSpec],
    files: dict[str, FileSpec],
) -> Manifest:
    return Manifest(
        format=FORMAT,
        family=family.name,
        dtype="float16" if request.dtype == "fp16" else "float32",
        video=VideoSpec(request.frames, (model.size, model.size), "bicubic", model.tokens_per_frame, 1, "floor"),
        prompt=PromptSpec(model.placeholder, model.after_video, model.stop, model.vocabulary),
        vision=model.vision,
        decoder=model.decoder,
        prune=op.attributes(_params(request, model)),
        graphs=graphs,
        files=files,
        source=source,
    )
