"""What an engine depends on, and the key made from it.

The key is a hash of exactly that: a change to anything else never rebuilds the engine.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from tango_runtime.bundle import GraphForm, GraphName, Manifest

#: Folder of the engines in a bundle.
FOLDER = "engines"

#: Shape of one input.
Shape = tuple[int, ...]
#: Smallest, typical and largest shape of one input.
Range = tuple[Shape, Shape, Shape]
#: The ranges of all inputs of a graph, by name.
Profile = dict[str, Range]

#: Indices of a portable decoder's profiles in its engine.
PREFILL, DECODE = 0, 1

#: trtexec's values of --hardware-compatibility, and TensorRT's name of each level.
HARDWARE_LEVELS = {"none": "NONE", "ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class Target:
    """The machine that an engine is for; :func:`tango_runtime.engines.target.current_target` gives this machine's.

    Attributes:
        tensorrt: Version of TensorRT, as ``8.6.0``.
        compute_capability: The GPU's, as ``9.0``.
        gpu: The GPU's name.
        plugin: Interface version of the TensorRT plugins, None if they are not built for this TensorRT.
    """

    tensorrt: str
    compute_capability: str
    gpu: str
    plugin: str | None = None


@dataclass(frozen=True)
class EngineSpec:
    """Everything that one engine depends on.

    Attributes:
        graph: The graph.
        form: In a ``device`` graph the weights are inputs and not part of the engine, so the engine serves every bundle
            with this graph, such as the next fine-tune.
        files: SHA-256 of the graph's files by name; empty for prune, whose network is one node made of ``attributes``.
        attributes: The operator's attributes; empty for all graphs but prune.
        plugin: Interface version of the TensorRT plugins; None if the engine has none.
        tensorrt: Version of TensorRT.
        compute_capability: The GPU's, as ``9.0``; ``8.0+`` for any GPU of at least 8.0.
        flags: Names of TensorRT's network and builder flags.
        hardware_compatibility: A key of ``HARDWARE_LEVELS``.
        optimization_level: TensorRT's builder optimization level.
        workspace: MiB, None for TensorRT's own limit.
        profiles: One profile; a portable decoder has two, ``PREFILL`` and ``DECODE``.
    """

    graph: GraphName
    form: GraphForm
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
        """The first sixteen hexadecimal digits of the hash of all fields."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """File name of the engine."""
        return f"{self.graph}-{self.key}.engine"


def digests(manifest: Manifest, graph: GraphName, form: GraphForm) -> dict[str, str]:
    """SHA-256 of the files that TensorRT reads of a graph, by name."""
    return {name: manifest.files[name].sha256 for name in manifest.engine_files(graph, form)}
