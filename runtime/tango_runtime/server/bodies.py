"""Bodies of requests, within the limits of size, number and time."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request

from tango_runtime.server.errors import ApiError
from tango_runtime.server.events import anext_of
from tango_runtime.server.settings import Settings
from tango_runtime.util.errors import first_line
from tango_runtime.util.jsonschema import unique_keys

#: Bodies that may be in memory, in multiples of the largest.
_BODIES = 4

#: Bytes of a body that are parsed in less time than another thread takes to begin.
_SMALL = 1 << 16


class Bodies:
    """Reads the bodies of all requests.

    Args:
        settings: Limits.
        in_thread: Calls a function on another thread.
    """

    def __init__(self, settings: Settings, in_thread: Callable[..., Awaitable[Any]]) -> None:
        self._settings, self._in_thread, self._held = settings, in_thread, 0

    async def json(self, request: Request) -> Any:
        """What a request's JSON holds."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body is JSON: say Content-Type: application/json")
        body = bytearray()
        try:
            async for piece in self.pieces(request, self._settings.max_body):
                body += piece
                self._held += len(piece)  # what arrived, not what was announced: a slow client keeps nobody else out
                if self._held > _BODIES * self._settings.max_body:
                    raise ApiError(429, "too many large requests arrive; ask again", headers={"Retry-After": "2"})
            return _parsed(body) if len(body) < _SMALL else await self._in_thread(_parsed, body)
        finally:
            self._held -= len(body)

    async def pieces(self, request: Request, most: int) -> AsyncIterator[bytes]:
        """A request's body as it arrives, within the limits of size and time."""
        too_large = ApiError(413, f"the body has more than {most / 1e6:.0f} MB")
        if int(request.headers.get("content-length") or 0) > most:
            raise too_large
        deadline, size, body = time.monotonic() + self._settings.body_seconds, 0, request.stream()
        while True:
            try:
                left = max(deadline - time.monotonic(), 0.001)
                piece = await asyncio.wait_for(anext_of(body), left)
            except StopAsyncIteration:
                return
            except (asyncio.TimeoutError, TimeoutError) as error:
                raise ApiError(408, f"the body did not arrive within {self._settings.body_seconds:g} s") from error
            size += len(piece)
            if size > most:
                raise too_large
            yield piece


def _parsed(body: bytearray) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        found = json.loads(body.decode(), parse_constant=refuse, object_pairs_hook=unique_keys)
        if re.search(rb"\\u[dD]", body):  # half a surrogate pair could not be sent back in an error
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {first_line(error)}") from error
