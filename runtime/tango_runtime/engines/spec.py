"""What an engine depends on, and the key that this makes.

The key is a hash of just that, so that what an engine does not depend on never rebuilds it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from tango_runtime.bundle import GraphName, Manifest

#: Folder of the engines in a bundle.
FOLDER = "engines"

#: Smallest, typical and largest shape of one input.
Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]
#: The ranges of all inputs of a graph, by name.
Profile = dict[str, Range]

#: The decoder's profiles, by their index in its engine.
PREFILL, DECODE = 0, 1

#: trtexec's words for --hardware-compatibility, and the flag of TensorRT that each one is.
HARDWARE_LEVELS = {"none": "NONE", "ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class Machine:
    """What an engine depends on beside its graph; :func:`tango_runtime.system.gpu.here` gives this machine's.

    Attributes:
        tensorrt: Version of TensorRT, as ``8.6.0``.
        compute_capability: Of the GPU, as ``9.0``.
        gpu: The GPU's name.
        plugin: Interface version of the TensorRT plugin, None where it is not built.
    """

    tensorrt: str
    compute_capability: str
    gpu: str
    plugin: str | None = None


@dataclass(frozen=True)
class Recipe:
    """All that one engine depends on; its key is the hash of this.

    Attributes:
        graph: Which graph.
        files: SHA-256 of the graph's files. None of prune's: its network is one node, made of ``attributes``.
        attributes: The operator's attributes, of prune only.
        plugin: Interface version of the TensorRT plugin, of prune only.
        tensorrt: Version of TensorRT.
        compute_capability: Of the GPU, as ``9.0``; ``8.0+`` where any from there on will do.
        flags: Names of TensorRT's network and builder flags.
        hardware_compatibility: A key of ``HARDWARE_LEVELS``.
        optimization_level: The builder's.
        workspace: MiB, None for TensorRT's own limit.
        profiles: One, or the decoder's two: ``PREFILL`` and ``DECODE``.
    """

    graph: GraphName
    files: dict[str, str]
    attributes: dict[str, int | str | list[int]]
    plugin: str | None
    tensorrt: str
    compute_capability: str
    flags: tuple[str, ...]
    hardware_compatibility: str
    optimization_level: int
    workspace: int | None
    profiles: tuple[Profile, ...]

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """File name of the engine."""
        return f"{self.graph}-{self.key}.engine"


def digests(manifest: Manifest, graph: GraphName) -> dict[str, str]:
    """SHA-256 of a graph's files, by name."""
    file = manifest.graphs[graph].file
    return {name: spec.sha256 for name, spec in manifest.files.items() if name in (file, f"{file}.data")}


def release(version: str) -> tuple[int, ...]:
    """A version as numbers: ``8.6.0`` → (8, 6, 0)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
