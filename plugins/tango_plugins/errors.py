"""The one exception that the project's own checks raise."""

from __future__ import annotations


class TangoError(Exception):
    """Something that the user can mend.

    The command line prints ``error: message`` and ``hint: hint`` and exits with 2.

    Args:
        message: What is wrong, naming the file, tensor or value.
        hint: What to do about it, a command where there is one.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})"
