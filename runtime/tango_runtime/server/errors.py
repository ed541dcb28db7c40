"""Errors as OpenAI's API gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tango_plugins import TangoError

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused or failed.

    Args:
        status: HTTP's status.
        message: What is wrong, and what to do.
        param: The key of the request that is wrong.
        headers: Further headers of the response.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})

    @classmethod
    def of(cls, error: Exception) -> ApiError:
        """Any error as one of these; what is no fault of the request is not described."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, TangoError):
            return cls(400, f"{error.message}; {error.hint}")
        return cls(500, f"the server failed: {type(error).__name__}")

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}
