"""Runs all checks."""

from __future__ import annotations

from pathlib import Path

from tango_runtime.bundle import Bundle
from tango_runtime.doctor.bundle import check_bundle
from tango_runtime.doctor.check import Diagnosis
from tango_runtime.doctor.machine import check_machine


def diagnose(bundle: Path | None = None, *, verify: bool = False) -> Diagnosis:
    """Checks this machine, and the engines of a bundle.

    Args:
        bundle: Folder of a bundle; None checks the machine alone.
        verify: Also compare the SHA-256 of the bundle's files and engines, which reads all of them.

    Raises:
        TangoError: The bundle is missing or not whole.
    """
    loaded = None if bundle is None else Bundle.load(bundle, verify=verify)
    machine = check_machine()
    checks = list(machine.checks)
    if loaded is not None:
        checks += check_bundle(loaded, machine, verify=verify)
    return Diagnosis(tuple(checks))
