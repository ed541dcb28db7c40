"""The exception that all checks of this project raise."""

from __future__ import annotations


class TangoError(Exception):
    """An error that the user can fix.

    The command line prints ``error: message`` and ``hint: hint`` and exits with 2.

    Args:
        message: What is wrong, naming the file, tensor or value.
        hint: How to fix it, with a command if there is one.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[TangoError], tuple[str, str]]:
        return TangoError, (self.message, self.hint)  # an exception is pickled with its first argument alone

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})"
