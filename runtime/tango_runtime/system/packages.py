"""Python packages that are installed here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tango_plugins import TangoError


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def import_tensorrt() -> Any:
    """The module ``tensorrt``.

    Raises:
        TangoError: It is not installed, or cannot be imported.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise TangoError(
            f"TensorRT cannot be imported: {error}", "pip install 'tango-edge[tensorrt]'; on a Jetson see: tango doctor"
        ) from error
    return tensorrt
