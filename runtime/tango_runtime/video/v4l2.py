"""Cameras of this machine, as FFmpeg reads them through Video4Linux."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_runtime.video.container import lenient
from tango_runtime.video.stream import CutError, Picture, decode

#: Seconds between two looks whether there is a picture.
_LOOK = 0.005

_HINTS = {
    errno.EACCES: "add the user to the group of the device: usermod -aG video USER",
    errno.EBUSY: "end the program that has it open: fuser DEVICE",
    errno.ENOTTY: "give the device of a camera; v4l2-ctl --list-devices tells which are",
}


class Camera:
    """A LiveInput of a Video4Linux device, in the format and size that it is set to.

    Written by FFmpeg's documentation and run against an imitation of a device, not on a camera.
    """

    ends = False

    def __init__(self, device: str, name: str) -> None:
        self.name, self._device, self._was_connected = name, device, False

    def pictures(self, patience: float, closed: threading.Event) -> Iterator[Picture | None]:
        """Opens the device, and reads; see :class:`tango_runtime.video.stream.LiveInput`."""
        import av

        def packets(stream: Any) -> Iterator[Any]:
            end = time.monotonic() + patience
            while not closed.is_set():
                try:
                    for packet in container.demux(stream):
                        if not packet.size:
                            return  # PyAV's mark of the end
                        own = _copied(packet)
                        del packet
                        yield own
                        end = time.monotonic() + patience
                except av.BlockingIOError:  # no picture yet
                    if time.monotonic() > end:
                        raise CutError(f"nothing came for {patience:.1f} s") from None
                    closed.wait(_LOOK)

        if "video4linux2,v4l2" not in av.formats_available:
            raise TangoError(f"{self.name} cannot be read: this FFmpeg has no Video4Linux", "read it by gst:v4l2src …")
        options = {"fflags": "+4"}  # do not block (AVFMT_FLAG_NONBLOCK), so that a silent camera can be left
        try:
            with av.open(self._device, format="v4l2", options=options, timeout=patience, **lenient()) as container:
                self._was_connected = True
                yield from decode(container, self.name, packets)
        except av.ExitError:  # FFmpeg's, where it was interrupted: by the time-out
            raise CutError(f"nothing came for {patience:.1f} s") from None
        except av.FFmpegError as error:
            if self._was_connected:
                raise CutError(error.strerror) from None
            raise TangoError(f"{self.name} cannot be read: {error.strerror}", self._hint(error.errno)) from error

    def _hint(self, number: int | None) -> str:
        if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            found = ", ".join(sorted(str(path) for path in Path("/dev").glob("video[0-9]*")))
            nothing = "there is no /dev/video*: connect a camera, or give it to the container"
            return f"these are there: {found}" if found else nothing
        return _HINTS.get(number or 0, "check the camera: ffmpeg -f v4l2 -i DEVICE -t 1 -f null -")


def _copied(packet: Any) -> Any:
    """A packet whose bytes are not the device's, which FFmpeg unmaps, with what gives them back, when it is closed."""
    import av

    own = av.Packet(bytes(packet))
    own.stream, own.pts, own.dts, own.time_base = packet.stream, packet.pts, packet.dts, packet.time_base
    own.is_keyframe = packet.is_keyframe
    return own
