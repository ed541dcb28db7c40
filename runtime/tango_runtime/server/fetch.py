"""Fetches what a client names by URL, from public addresses only: the address that was checked is connected to."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from time import monotonic
from urllib.parse import SplitResult, urljoin, urlsplit

from tango_runtime.server.errors import ApiError

_REDIRECTS = 5
_CHUNK = 1 << 16


def fetch(url: str, to: Path, *, most: int, deadline: float, allow_private: bool = False) -> None:
    """Writes what a URL gives to a file.

    Args:
        url: http: or https:.
        to: The file.
        most: Most bytes.
        deadline: When it must be there, of the monotonic clock.
        allow_private: Connect to addresses that are not public, too.

    Raises:
        ApiError: The URL or a redirect of it is not allowed, or it gives nothing within the limits.
    """
    for _ in range(_REDIRECTS + 1):
        parts = _checked(url)
        try:
            location = _get(parts, to, most, deadline, allow_private)
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = isinstance(error, TimeoutError) or monotonic() >= deadline
            reason = "it takes too long" if late else (str(error) or type(error).__name__)[:200]
            raise ApiError(400, f"{_shown(parts)} cannot be fetched: {reason}", "url") from error
        if location is None:
            return
        try:
            url = urljoin(url, location)
        except ValueError as error:
            raise ApiError(
                400, f"{_shown(parts)} is redirected to {location[:60]!r}, which is no URL", "url"
            ) from error
    raise ApiError(400, f"{_shown(parts)} is redirected more than {_REDIRECTS} times", "url")


def public_addresses(host: str, port: int, *, allow_private: bool) -> list[str]:
    """The addresses of a host, once each of them is known to be public.

    Raises:
        ApiError: One is not, and need be.
        OSError: It has none.
    """
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not allow_private and not _is_public(address):
            raise ApiError(400, f"{host} has an address that is not public", "url")
    return found


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is not None or address in ipaddress.ip_network("64:ff9b::/96"):  # an IPv4 address inside
            return inner is not None and address.ipv4_mapped is not None and _is_public(str(inner))
    return address.is_global and not address.is_multicast


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ApiError(400, f"{url[:60]!r} is no URL", "url") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ApiError(400, f"{url[:60]!r} is no http: or https: URL with a host", "url")
    if parts.username is not None or any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise ApiError(400, "the URL has a user or a blank in it", "url")
    return parts


def _get(parts: SplitResult, to: Path, most: int, deadline: float, allow_private: bool) -> str | None:
    """Writes a response's body; gives where to look instead if it is a redirect."""
    assert parts.hostname is not None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    addresses = public_addresses(parts.hostname, port, allow_private=allow_private)
    with closing(_connect(parts, addresses[0], port, deadline)) as connection, _until(deadline, connection):
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "*/*", "User-Agent": "tango-edge"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (location := response.getheader("Location")):
            return location
        if response.status != 200:
            raise ApiError(400, f"{_shown(parts)} answers with status {response.status}", "url")
        length = response.length  # None where the body is in chunks, or ends with the connection
        if length is not None and length > most:
            raise _too_large(parts, most)
        size = 0
        with to.open("wb") as file:
            while piece := response.read1(_CHUNK):
                size += len(piece)
                if size > most:
                    raise _too_large(parts, most)
                file.write(piece)
        _left(deadline)  # a body that was cut off at the deadline may look whole
        if length is not None and size < length:
            raise OSError(f"it ended after {size} of {length} bytes")
    return None


@contextmanager
def _until(deadline: float, connection: http.client.HTTPConnection) -> Iterator[None]:
    """Ends a connection at a deadline, however slowly it gives a byte after the other."""
    connection.connect()
    sock = connection.sock  # a connection forgets it when it has the response

    def end() -> None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(deadline - monotonic(), 0.0), end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _To(http.client.HTTPConnection):
    """A connection to an address, whatever the host's name says at the next look-up."""

    def __init__(self, host: str, port: int, address: str, context: ssl.SSLContext | None, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._address, self._context = address, context

    def connect(self) -> None:
        """Connects to the address; the certificate is the host's."""
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._context is not None:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)


def _connect(parts: SplitResult, address: str, port: int, deadline: float) -> http.client.HTTPConnection:
    secure = parts.scheme == "https"
    context = ssl.create_default_context() if secure else None
    connection = _To(parts.hostname or "", port, address, context, _left(deadline))
    connection.default_port = 443 if secure else 80  # which the Host header leaves out
    return connection


def _left(deadline: float) -> float:
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError("it takes too long")
    return left


def _too_large(parts: SplitResult, most: int) -> ApiError:
    return ApiError(413, f"{_shown(parts)} has more than {most / 1e6:.0f} MB", "url")


def _shown(parts: SplitResult) -> str:
    """A URL for messages, without what may be secret in it."""
    return f"{parts.scheme}://{parts.hostname}{parts.path[:60]}"
