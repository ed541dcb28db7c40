"""Writes the generated parts of docs/: run ``python -m tools.docs``, or ``make reference``."""
