"""Which RTSP cameras a client may name: those of hosts that the operator allowed, at the address that was checked."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit, urlunsplit

from tango_plugins import TangoError
from tango_runtime.server.errors import ApiError

_PORT = 554


@dataclass(frozen=True)
class AllowedHost:
    """A value of ``--allow-rtsp``: ``HOST``, ``HOST:PORT``, ``ADDRESS`` or ``ADDRESS/BITS``.

    Attributes:
        text: As given.
        host: The name, in lower case; empty for addresses.
        network: The addresses; None for a name.
        port: The only port; None for any.
    """

    text: str
    host: str
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None
    port: int | None

    @classmethod
    def parse(cls, text: str) -> AllowedHost:
        """Reads one.

        Raises:
            TangoError: It is none.
        """
        wrong = TangoError(f"--allow-rtsp: {text!r} is no host", "give HOST, HOST:PORT, ADDRESS or ADDRESS/BITS")
        if "/" in text or (text.count(":") > 1 and not text.startswith("[")):
            host, port = text, None
        else:
            try:
                parts = urlsplit(f"rtsp://{text}")
                host, port = parts.hostname or "", parts.port
            except ValueError as error:
                raise wrong from error
            if not host or parts.username is not None or parts.path or parts.query or parts.fragment:
                raise wrong
        try:
            return cls(text, "", ipaddress.ip_network(host, strict=False), port)
        except ValueError as error:
            if "/" in text or ":" in host:
                raise wrong from error
            return cls(text, host.lower(), None, port)

    def allows(self, host: str, addresses: Sequence[str], port: int) -> bool:
        """Whether it allows a host with these addresses."""
        if self.port not in (None, port):
            return False
        if self.network is None:
            return host.lower() == self.host
        return all(ipaddress.ip_address(address.partition("%")[0]) in self.network for address in addresses)


def checked_rtsp(url: str, allowed: Sequence[AllowedHost], *, allow_private: bool) -> str:
    """An ``rtsp:`` URL with an address in place of its host, so that FFmpeg connects to what was checked.

    Args:
        url: The client's.
        allowed: Hosts of the operator.
        allow_private: Allow every host.

    Raises:
        ApiError: It is no such URL, its host is not allowed, or has no address.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or _PORT
    except ValueError as error:
        raise ApiError(400, "the source is no rtsp: URL", "url") from error
    if parts.scheme != "rtsp" or not host or any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise ApiError(400, "the source is no rtsp: URL with a host", "url")
    if not allowed and not allow_private:
        raise ApiError(403, "rtsp: sources are not read; the server was started without --allow-rtsp", "url")
    try:
        addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise ApiError(400, f"{host[:60]} has no address", "url") from error
    if not allow_private and not any(entry.allows(host, addresses, port) for entry in allowed):
        raise ApiError(403, f"{host[:60]}:{port} is not among the hosts of --allow-rtsp", "url")
    return _at(parts, addresses[0], port)


def _at(parts: SplitResult, address: str, port: int) -> str:
    user, at, _ = parts.netloc.rpartition("@")
    shown = f"[{address}]" if ":" in address else address
    return urlunsplit(parts._replace(netloc=f"{user}{at}{shown}:{port}", fragment=""))
