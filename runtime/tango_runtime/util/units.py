"""Sizes as text; a MB is 10^6 bytes, a GB 10^9."""

from __future__ import annotations


def megabytes(size: float, digits: int = 0) -> str:
    """Bytes → ``512 MB``."""
    return f"{size / 1e6:.{digits}f} MB"


def gigabytes(size: float, digits: int = 1) -> str:
    """Bytes → ``1.5 GB``."""
    return f"{size / 1e9:.{digits}f} GB"
