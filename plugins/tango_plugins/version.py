"""The version of tango-edge. pyproject.toml has it, and nothing else: this reads what was installed from there."""

from __future__ import annotations


def package_version() -> str:
    """The version of the installed distribution, ``unknown`` for sources that were not installed."""
    from importlib.metadata import PackageNotFoundError, version  # late: it takes longer to load than all else here

    try:
        return version("tango-edge")
    except PackageNotFoundError:
        return "unknown"
