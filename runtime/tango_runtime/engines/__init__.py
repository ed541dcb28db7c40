"""TensorRT engines of a bundle: which ones are planned, which ones exist, and which one fits this machine.

An engine is ``BUNDLE/engines/<graph>-<key>.engine``. Its sidecar, ``<graph>-<key>.json``, holds in plain text what the
engine was built from. The sidecar is written last: an engine without a sidecar does not count.

`tango build` builds what :func:`plan_engines` returns, the runtime loads what :func:`find` returns. Only worker.py
needs TensorRT. docs/design/engine-builds.md explains the build.
"""

from tango_runtime.engines.planning import BuildOptions, EngineMemory, EnginePlan, all_graphs, plan_engines
from tango_runtime.engines.spec import DECODE, FOLDER, HARDWARE_LEVELS, PREFILL, EngineSpec, Profile, Target
from tango_runtime.engines.store import FORMAT, BuiltEngine, Sidecar, build_command, check, find, read_sidecar, sidecars

__all__ = [
    "DECODE", "FOLDER", "FORMAT", "HARDWARE_LEVELS", "PREFILL", "BuildOptions", "BuiltEngine", "EngineMemory",
    "EnginePlan", "EngineSpec", "Profile", "Sidecar", "Target", "all_graphs", "build_command", "check", "find",
    "plan_engines", "read_sidecar", "sidecars",
]  # fmt: skip
