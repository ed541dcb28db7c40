"""Bundles of any precision with device graphs; an export writes them in fp16 only."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from tango_export.export import DTYPES, find_preset, open_model, write_device_graphs
from tango_runtime.bundle import Bundle, describe, write_manifest


def with_device_graphs(bundle: Path, folder: Path, dtype: str) -> Path:
    """Copies a bundle of this precision into a new folder, and writes the device graphs of what it was made from."""
    shutil.copytree(bundle, folder)
    manifest = Bundle.load(folder).manifest
    source, decoder = manifest.source, manifest.decoder
    family = find_preset(manifest.family)[0]
    model = open_model(family, source.checkpoint, source.salience, decoder.context, decoder.inner)
    graphs = manifest.graphs | write_device_graphs(folder, model, manifest.graphs, DTYPES[dtype])
    devices = [spec.device.file for spec in graphs.values() if spec.device]
    files = manifest.files | {file: describe(folder / file) for file in devices}
    write_manifest(folder, replace(manifest, graphs=graphs, files=files))
    return folder
