"""`tango doctor`: checks of this machine and of a bundle's engines, each with the command that fixes it."""

from tango_runtime.doctor.check import Check, Diagnosis
from tango_runtime.doctor.diagnose import diagnose

__all__ = ["Check", "Diagnosis", "diagnose"]
