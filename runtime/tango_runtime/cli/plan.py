"""`tango plan`: estimates whether a model fits a device, and how fast it would be there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_runtime.cli.args import (
    STDOUT,
    add_context,
    add_every,
    add_fps,
    add_frame,
    add_frames,
    add_json,
    add_max_new_tokens,
    add_precisions,
    add_pruning,
    add_streams,
    write_json,
)
from tango_runtime.cli.command import Command
from tango_runtime.sizing.devices import DEVICES, Device, find_device
from tango_runtime.sizing.estimate import Estimate, SizingOptions, estimate, nearest_fit, smallest_device
from tango_runtime.sizing.models import ModelDimensions, find_model, released_models
from tango_runtime.sizing.streams import StreamCapacity, StreamLoad, stream_capacity
from tango_runtime.sizing.times import COMPUTE, DECODER_PASSES, LAYER, MEMORY, OWN_COMPUTE, OWN_MEMORY, TOWER_PASSES
from tango_runtime.util.files import check_apart
from tango_runtime.util.units import gigabytes

_ALL = "all"


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help=f"model ({', '.join(released_models())}, or the folder of a bundle)"
    )
    parser.add_argument("--device", required=True, help=f"{', '.join(DEVICES)}, or {_ALL} to compare all")
    add_frames(parser, note="the model's")
    add_frame(parser, "the model's")
    add_pruning(parser, "the model's")
    add_precisions(parser)
    add_context(parser, "the longest prompt plus 512")
    add_streams(parser, None, "plan for one video")
    add_every(parser)
    add_fps(parser)
    add_max_new_tokens(parser, 32)
    add_json(parser)


def _options(args: argparse.Namespace) -> SizingOptions:
    return SizingOptions(
        frames=args.frames,
        retention_ratio=args.retention_ratio,
        prune=not args.no_prune,
        vision=args.vision,
        decoder=args.decoder,
        context=args.context,
        frame=args.frame,
    )


def _load(args: argparse.Namespace) -> StreamLoad | None:
    return args.streams and StreamLoad(args.streams, args.every, args.fps or 1.0, args.max_new_tokens)


def _run(args: argparse.Namespace) -> int:
    options, load = _options(args), _load(args)
    check_apart({"--json": args.json}, {"the bundle": Path(args.model)})
    if args.device == _ALL:
        return _run_all(find_model(args.model), options, load, args.json)
    found = estimate(find_model(args.model), find_device(args.device), options)
    capacity = load and stream_capacity(found, load)
    if args.json:
        write_json(args.json, _as_json(args.device, found, options, load))
    if args.json != STDOUT:
        _print(args.device, found, options)
        if capacity:
            _print_streams(capacity, found)
    return 0 if _holds(found, load) else 1


def _holds(found: Estimate, load: StreamLoad | None) -> bool:
    """Whether the model fits, with all of its streams."""
    return found.fits if load is None else stream_capacity(found, load).holds


def _run_all(model: ModelDimensions, options: SizingOptions, load: StreamLoad | None, json_file: Path | None) -> int:
    """One line per device; a device that cannot run the model at all says why."""
    estimate(model, find_device("h200"), options)  # it runs everything: an error here is the options' fault
    found = {name: _attempt(model, device, options) for name, device in DEVICES.items()}
    if json_file:
        write_json(json_file, [_entry(name, each, options, load) for name, each in found.items()])
    if json_file != STDOUT:
        _print_all(found, options, load)
    return 0 if any(isinstance(each, Estimate) and _holds(each, load) for each in found.values()) else 1


def _attempt(model: ModelDimensions, device: Device, options: SizingOptions) -> Estimate | TangoError:
    try:
        return estimate(model, device, options)
    except TangoError as error:
        return error


def _print(name: str, found: Estimate, options: SizingOptions) -> None:
    device, workload = found.device, found.workload
    print(f"{found.model.name} on {name}, {device.title}" + (f" ({device.mode})" if device.mode else ""))
    thinned = "" if workload.thinned is None else f", {workload.thinned} of them in the decoder's upper layers"
    frames = f"{workload.frames} frames of {workload.size[1]}x{workload.size[0]}"
    print(f"{frames}, {workload.tokens} video tokens, {workload.kept} kept{thinned}; context {workload.context}")
    if packs := device.packs(workload.vision, workload.decoder):
        print("JetPack " + ", ".join(f"{pack} (TensorRT {tensorrt})" for pack, tensorrt in packs.items()))
    print()
    _print_memory(found)
    print(f"{_verdict(found)}: {gigabytes(found.memory.total, 2)} of {gigabytes(device.usable, 2)}")
    for line in _advice(found, options):
        print(line)
    print()
    _print_times(found)


def _print_memory(found: Estimate) -> None:
    memory, workload = found.memory, found.workload
    precisions = {"vision": workload.vision, "embed": "fp16", "decoder": workload.decoder, "cache": "fp16"}
    for part, size in vars(memory).items():
        if size:
            print(f"  {part:<12}{precisions.get(part, ''):<6}{gigabytes(size, 2):>11}")


def _print_times(found: Estimate) -> None:
    times = found.times
    print("estimated, not measured:")
    for stage in ("vision", "prune", "prefill"):
        print(f"  {stage:<12}{1e3 * getattr(times, stage):>14.1f} ms")
    print(f"  {'first token':<12}{1e3 * times.first_token:>14.1f} ms, from frames on the device")
    print(f"  {'then':<12}{1 / times.token:>14.1f} tokens/s")
    own = "" if found.device.jetson else f" ({OWN_COMPUTE:.0%} in INT8 and INT4)"
    print(
        f"at {COMPUTE:.0%} of peak compute{own}, {MEMORY:.0%} of peak bandwidth, {TOWER_PASSES} and {DECODER_PASSES} "
        f"passes over the activations of tower and decoder, and {1e3 * LAYER:.2f} ms per layer, as measured with "
        "device graphs on ONNX Runtime on an H200"
    )
    if found.device.unverified:
        print(f"not confirmed by an NVIDIA source: {found.device.unverified}")


def _print_streams(capacity: StreamCapacity, found: Estimate) -> None:
    load, total, usable = capacity.load, gigabytes(capacity.memory, 2), gigabytes(found.device.usable, 2)
    bounds = f"memory for {capacity.most_by_memory}, time for {capacity.most_by_time}"
    print()
    asked = f"each of {load.fps:g} frames/s, a question every {load.every:g} s, {load.answer} tokens"
    print(f"streams: {load.streams}, {asked}")
    print("estimated, not measured:")
    print(f"  {'memory':<12}{total:>17} of {usable}, {gigabytes(capacity.per_stream, 2)} for each")
    print(f"  {'busy':<12}{capacity.busy:>14.1%}    vision {capacity.vision:.1%}, answers {capacity.answers:.1%}")
    print(f"  {'at most':<12}{capacity.most:>14} streams, {bounds}")


def _verdict(found: Estimate) -> str:
    return "fits" if found.fits else "does not fit"


def _advice(found: Estimate, options: SizingOptions) -> list[str]:
    lines = [] if found.fits else [_would_fit(found, options)]
    where = "" if found.builds else ", more than it has"
    lines.append(f"building the engines takes up to {gigabytes(found.build, 2)}{where}")
    if not found.builds and (elsewhere := _builder(found)):
        lines[-1] += f"; build on {elsewhere}, which has the same compute capability, and copy BUNDLE/engines"
    return lines


def _would_fit(found: Estimate, options: SizingOptions) -> str:
    changed, larger = nearest_fit(found, options), smallest_device(found, options)
    ways = [f"with {_flags(options, changed, found)}"] if changed else []
    ways += [f"unchanged on {larger}"] if larger else []
    return f"would fit {', or '.join(ways)}" if ways else "no precision, number of frames or device makes it fit"


def _builder(found: Estimate) -> str | None:
    """The device with the least memory on which engines for this one can be built."""
    same = (
        (device.memory, name)
        for name, device in DEVICES.items()
        if device.compute_capability == found.device.compute_capability and found.build <= device.usable
    )
    return min(same, default=(0, None))[1]


def _flags(options: SizingOptions, changed: SizingOptions, found: Estimate) -> str:
    """The options that differ."""
    workload, flags = found.workload, []
    if changed.prune and not options.prune:
        flags.append("pruning")
    if changed.frames != workload.frames:
        flags.append(f"--frames {changed.frames}")
    if changed.vision != workload.vision:
        flags.append(f"--vision {changed.vision}")
    if changed.decoder != workload.decoder:
        flags.append(f"--decoder {changed.decoder}")
    return " ".join(flags)


def _print_all(found: dict[str, Estimate | TangoError], options: SizingOptions, load: StreamLoad | None) -> None:
    column = "" if load is None else f"{'streams':>9}"
    print(
        f"{'device':<15}{'memory':>10}{'usable':>12}{'first token':>13}{'tokens/s':>10}{column}  (times are estimates)"
    )
    for name, each in found.items():
        if isinstance(each, TangoError):
            print(f"{name:<15}{each.message}")
            continue
        sizes = f"{gigabytes(each.memory.total, 2):>10}{gigabytes(each.device.usable, 2):>12}"
        times = f"{1e3 * each.times.first_token:>10.0f} ms{1 / each.times.token:>10.1f}"
        times += "" if load is None else f"{stream_capacity(each, load).most:>9}"
        changed = None if each.fits else nearest_fit(each, options)
        remedy = f", would fit with {_flags(options, changed, each)}" if changed else ""
        print(f"{name:<15}{sizes}{times}  {_verdict(each)}{remedy}")


def _entry(name: str, found: Estimate | TangoError, options: SizingOptions, load: StreamLoad | None) -> dict[str, Any]:
    if isinstance(found, TangoError):
        return {"device": name, "error": found.message, "hint": found.hint}
    return _as_json(name, found, options, load)


def _as_json(name: str, found: Estimate, options: SizingOptions, load: StreamLoad | None) -> dict[str, Any]:
    device, memory, times = found.device, found.memory, found.times
    capacity = load and stream_capacity(found, load)
    changed = None if found.fits else nearest_fit(found, options)
    return {
        "model": found.model.name,
        "device": name,
        "title": device.title,
        "mode": device.mode,
        "jetpacks": device.jetpacks,
        "unverified": device.unverified,
        "workload": vars(found.workload),
        "bytes": vars(memory) | {"total": memory.total, "usable": device.usable, "build": found.build},
        "fits": found.fits,
        "builds": found.builds,
        "would_fit": _flags(options, changed, found) if changed else None,
        "fits_on": name if found.fits else smallest_device(found, options),
        "estimated_seconds": vars(times) | {"first_token": times.first_token},
        "estimated_tokens_per_second": 1 / times.token,
        "streams": capacity and _streams_as_json(capacity),
        "factors": {
            "compute": COMPUTE,
            "memory": MEMORY,
            "own": {"compute": OWN_COMPUTE, "memory": OWN_MEMORY},
            "passes": {"tower": TOWER_PASSES, "decoder": DECODER_PASSES},
            "seconds_per_layer": LAYER,
        },
    }


def _streams_as_json(capacity: StreamCapacity) -> dict[str, Any]:
    load = capacity.load
    return {
        "streams": load.streams,
        "every_seconds": load.every,
        "fps": load.fps,
        "answer_tokens": load.answer,
        "bytes": {"total": capacity.memory, "per_stream": capacity.per_stream},
        "estimated_busy": {"vision": capacity.vision, "answers": capacity.answers, "total": capacity.busy},
        "at_most": {"memory": capacity.most_by_memory, "time": capacity.most_by_time},
        "holds": capacity.holds,
    }


PLAN = Command(_configure, _run)
