"""Runs a server until it is told to stop, and lets the answers that are written end."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Mapping
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tango_plugins import TangoError
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.server.app import Server
from tango_runtime.server.service import Service
from tango_runtime.server.settings import Settings

#: Connections beyond those that wait or are answered: health checks, uploads, the page.
_MORE_CONNECTIONS = 256

#: Seconds that a connection may be idle after a request, and that the head of a request may take.
_KEEP_ALIVE, _HEAD_SECONDS = 75, 60.0

#: Seconds after which a thread of Python makes way for another. By default, a piece of an answer may wait 5 ms for
#: the model's thread, which is at the next.
_SWITCH = 0.0005


class _Protocol(H11Protocol):
    """HTTP/1.1, but a connection that asks nothing is closed, however slowly bytes come: uvicorn waits for ever."""

    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called when a client connects."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Called with a client's bytes."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the client is gone."""
        super().connection_lost(exc)
        if self._closing is not None:
            self._closing.cancel()

    def _watch(self) -> None:
        """Lets the time begin where the bytes of a request are awaited, or end where there is one."""
        awaited = self.cycle is None or self.cycle.response_complete
        if awaited and self._closing is None:
            self._closing = self.loop.call_later(_HEAD_SECONDS, self.transport.close)
        elif not awaited and self._closing is not None:
            self._closing.cancel()
            self._closing = None


class _Uvicorn(uvicorn.Server):
    """Tells the service when it is asked to stop, before it waits for the answers."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal."""
        self._service.draining = True
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        TangoError: The address is in use or is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise TangoError(f"cannot listen at {host}:{port}: {error}", "choose another --host or --port") from error
    # Its connections inherit it. Without, a response's second piece waits for the client to acknowledge the first.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def configured(service: Service) -> uvicorn.Config:
    """How uvicorn serves a service."""
    settings = service.settings
    return uvicorn.Config(
        Server(service).app(),
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        limit_concurrency=settings.waiting + settings.together + _MORE_CONNECTIONS,
        h11_max_incomplete_event_size=1 << 16,
        http=_Protocol,
        ws="none",
    )


def serve(
    models: Mapping[str, VideoLLM],
    settings: Settings,
    sock: socket.socket,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGTERM or SIGINT; then it takes no more requests, and waits for those that are answered.

    Args:
        models: Loaded bundles by name.
        settings: Limits.
        sock: Listens.
        ready: Called when requests are taken.
    """
    service = Service(models, settings)
    runner = _Uvicorn(configured(service), service)
    sys.setswitchinterval(_SWITCH)
    ready()
    try:
        asyncio.run(runner.serve(sockets=[sock]))
    except KeyboardInterrupt:  # uvicorn raises the signal again that stopped it
        if not runner.should_exit:
            raise
    finally:
        sock.close()
