"""Helpers for all packages: output files, the console, checked JSON, errors, units and versions."""
