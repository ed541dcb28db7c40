"""TensorRT engines of a bundle on disk: which are built, with what, and which of them fits this machine.

An engine stands in ``BUNDLE/engines`` as ``<graph>-<key>.engine``, and beside it ``<graph>-<key>.json`` tells in clear
what it was made of. The sidecar is written last: an engine without one is not there.

`tango build` builds what :func:`plan` gives, the runtime loads what :func:`find` gives. Only builder.py needs TensorRT.
"""

from tango_runtime.engines.planning import BuildOptions, Estimate, Planned, plan
from tango_runtime.engines.spec import DECODE, FOLDER, HARDWARE_LEVELS, PREFILL, Machine, Profile, Recipe, release
from tango_runtime.engines.store import FORMAT, Found, Sidecar, build_command, check, find, read_sidecar, sidecars

__all__ = [
    "DECODE", "FOLDER", "FORMAT", "HARDWARE_LEVELS", "PREFILL", "BuildOptions", "Estimate", "Found", "Machine",
    "Planned", "Profile", "Recipe", "Sidecar", "build_command", "check", "find", "plan", "read_sidecar", "release",
    "sidecars",
]  # fmt: skip
