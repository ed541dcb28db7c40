"""Responses that end when their client leaves: server-sent events, and answers that are waited for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

_T = TypeVar("_T")

#: Time that a task has to end after it was cancelled.
_CANCELLED_AGAIN_S = 0.2


class ClientLeftError(Exception):
    """Nobody waits for the response any more."""


class EventStream:
    """Server-sent events as an ASGI response.

    Args:
        events: Their data, as text.
        send_seconds: Most time that a client may take to accept one.
        source: What they are made of; it is closed with them, also where none of them was sent.
    """

    def __init__(
        self, events: AsyncGenerator[str, None], send_seconds: float, source: AsyncGenerator[Any, None] | None = None
    ) -> None:
        self._events, self._seconds, self._source = events, send_seconds, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end or the client leaves."""
        try:
            with suppress(ClientLeftError, asyncio.TimeoutError, TimeoutError):
                await unless_left(receive, self._send_all(send))
        finally:
            await self._events.aclose()
            if self._source is not None:
                await self._source.aclose()

    async def _send_all(self, send: Send) -> None:
        async def put(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), self._seconds)

        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await put({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self._events:
            await put({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        await put({"type": "http.response.body", "body": b""})


async def unless_left(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Does some work, and cancels it when the client leaves.

    Raises:
        ClientLeftError: It left.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientLeftError
        return doing.result()
    finally:
        for task in (doing, leaving):
            await _end(task)


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancels a task until it has ended: before Python 3.12 ``wait_for`` may lose a cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_CANCELLED_AGAIN_S)
    if not task.cancelled():
        task.exception()  # seen, or Python tells of it


def as_json(value: object) -> str:
    """JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def anext_of(items: Any) -> Any:
    """The next of an asynchronous iterator, as a coroutine."""
    return await items.__anext__()
