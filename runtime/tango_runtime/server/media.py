"""A client's media: what a URL names becomes a file of the server's own, known by the hash of its bytes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from urllib.parse import unquote, urlsplit

from tango_runtime.server.chat import Media
from tango_runtime.server.errors import ApiError
from tango_runtime.server.fetch import fetch
from tango_runtime.server.settings import Settings

#: Files whose hash is remembered.
_KNOWN = 1024


@dataclass(frozen=True)
class LocalMedia:
    """Media as files.

    Attributes:
        paths: The video, or the images.
        images: Whether they are images.
        seconds: When each image is, if that was said.
        digest: Hash of the bytes and of the times.
    """

    paths: tuple[Path, ...]
    images: bool
    seconds: tuple[float, ...] | None
    digest: str


class MediaStore:
    """Brings media here, and keeps uploads as long as there is room.

    Args:
        settings: The server's limits.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._temporary = tempfile.TemporaryDirectory(prefix="tango-serve-")
        self.folder = Path(self._temporary.name)
        self._lock, self._lock_digests = threading.Lock(), threading.Lock()
        self._uploads: OrderedDict[str, Path] = OrderedDict()
        self._digests: OrderedDict[tuple[str, int, int, int], str] = OrderedDict()

    def close(self) -> None:
        """Removes all files."""
        self._temporary.cleanup()

    @contextmanager
    def local(self, media: Media) -> Iterator[LocalMedia]:
        """The media as files, which are there while the block runs.

        Raises:
            ApiError: A URL is not allowed, or cannot be read within the limits.
        """
        with ExitStack() as stack:
            urls = [url for text in media.urls for url in _frames_of(text)]
            if len(urls) > self._settings.max_images:
                raise ApiError(
                    400, f"there are {len(urls)} images; at most {self._settings.max_images} are taken", "url"
                )
            images = media.images or len(urls) > 1 or urls[0].startswith("data:image/")
            paths, left = [], self._settings.max_media
            deadline = monotonic() + self._settings.fetch_seconds
            for url in urls:
                paths.append(self._open(url, stack, left, deadline))
                left -= paths[-1].stat().st_size
                if left < 0:
                    raise ApiError(413, f"the media have more than {self._settings.max_media / 1e6:.0f} MB", "url")
            digest = hashlib.sha256("".join(map(self._digest, paths)).encode())
            digest.update(repr((images, media.seconds)).encode())
            yield LocalMedia(tuple(paths), images, media.seconds, digest.hexdigest())

    def keep(self, file: Path) -> str:
        """Keeps an uploaded file, and forgets the oldest where there are too many bytes; gives its id."""
        name = f"video:{self._digest(file)}"
        with self._lock:
            if name in self._uploads:
                file.unlink()
                self._uploads.move_to_end(name)
                return name
            self._uploads[name] = file
            sizes = {key: path.stat().st_size for key, path in self._uploads.items()}
            while sum(sizes.values()) > self._settings.uploads and len(self._uploads) > 1:
                key, path = self._uploads.popitem(last=False)
                del sizes[key]
                path.unlink()
        return name

    def new_file(self) -> Path:
        """A path that nobody uses."""
        return self.folder / uuid.uuid4().hex

    def _open(self, url: str, stack: ExitStack, most: int, deadline: float) -> Path:
        scheme = url.partition(":")[0].lower()
        if scheme == "file":
            return self._file(url)
        path = self.new_file()
        stack.callback(_remove, path)
        if scheme == "video":
            self._link(url, path)
        elif scheme == "data":
            path.write_bytes(_data(url))
        elif scheme in ("http", "https"):
            fetch(url, path, most=most, deadline=deadline, allow_private=self._settings.allow_private)
        else:
            raise ApiError(400, f"{url[:40]!r} is no http:, https:, data:, file:, video: or stream: URL", "url")
        return path

    def _link(self, name: str, path: Path) -> None:
        """A second name for an upload, so that it lasts while it is read."""
        with self._lock:
            if name not in self._uploads:
                raise ApiError(404, f"there is no upload {name[:80]!r} any more; upload it again", "url")
            self._uploads.move_to_end(name)
            path.hardlink_to(self._uploads[name])

    def _file(self, url: str) -> Path:
        """The file of a ``file:`` URL, which is under the media root."""
        root = self._settings.media_root
        if root is None:
            raise ApiError(403, "files of the server are not served; it was started without --media-root", "url")
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ApiError(400, "a file: URL names a file of this machine", "url")
        root = root.resolve()
        try:
            path = (root / unquote(parts.path)).resolve(strict=True)
            allowed = path.is_relative_to(root) and path.is_file()
        except (OSError, ValueError, RuntimeError):
            allowed = False
        if not allowed:  # the same answer for what is outside, so that nobody learns what is there
            raise ApiError(404, "there is no such file under the media root", "url")
        return path

    def _digest(self, path: Path) -> str:
        """Hash of a file's bytes, remembered as long as the file looks the same."""
        status = path.stat()
        key = str(path), status.st_ino, status.st_size, status.st_mtime_ns
        with self._lock_digests:
            if key in self._digests:
                return self._digests[key]
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        with self._lock_digests:
            self._digests[key] = found = digest.hexdigest()
            while len(self._digests) > _KNOWN:
                self._digests.popitem(last=False)
        return found


def _frames_of(url: str) -> list[str]:
    """vLLM's form of a video as images: ``data:video/jpeg;base64,FRAME,FRAME,…``; any other URL is itself."""
    head, comma, data = url.partition(",")
    if comma and head.lower() in ("data:video/jpeg;base64", "data:video/png;base64"):
        return [f"{head.replace('video', 'image', 1)},{frame}" for frame in data.split(",")]
    return [url]


def _data(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(400, "a data: URL must be ;base64,…", "url")
    try:
        found = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, "a data: URL is no base64", "url") from error
    if not found:
        raise ApiError(400, "a data: URL is empty", "url")
    return found


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
