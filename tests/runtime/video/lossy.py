"""A proxy of an RTSP connection over TCP that loses some of the stream's packets, as a bad network would over UDP."""

from __future__ import annotations

import random
import re
import socket
import threading
from contextlib import suppress
from typing import BinaryIO


class LossyProxy:
    """Relays one connection after the other to a port of this machine.

    Args:
        port: Of the server.
        loss: How many of the packets of media it drops.
        seed: Which ones.

    Attributes:
        port: Its own.
        dropped: Packets that it dropped.
    """

    def __init__(self, port: int, loss: float, seed: int = 0) -> None:
        self._to, self._loss, self._chance, self.dropped = port, loss, random.Random(seed), 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Takes no more connections; those that there are end with their ends."""
        self._socket.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for relay in (self._requests, self._replies):
                    threading.Thread(target=relay, args=(client, server), daemon=True).start()

    @staticmethod
    def _requests(client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _replies(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError), server.makefile("rb") as stream:
            while piece := _next(stream):
                if piece[:2] == b"$\0" and self._chance.random() < self._loss:
                    self.dropped += 1
                else:
                    client.sendall(piece)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def _next(stream: BinaryIO) -> bytes:
    """A packet (RFC 2326, section 10.12: $, channel, size) or a reply with its body; nothing at the end."""
    first = stream.read(1)
    if first == b"$":
        head = stream.read(3)
        return first + head + stream.read(int.from_bytes(head[1:], "big"))
    head = first
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return head
        head += line
    size = re.search(rb"(?i)content-length: *(\d+)", head)
    return head + stream.read(int(size[1]) if size else 0)
