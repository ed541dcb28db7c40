"""A real RTSP server on the loopback, of GStreamer; run by a Python that has its bindings (Debian: python3-gi).

    python3 rtsp_server.py PORT [USER PASSWORD]

It serves a live H.264 picture of one color at rtsp://127.0.0.1:PORT/live, prints the port when it listens (0 takes a
free one), and takes commands, a line each: ``WIDTH HEIGHT COLOR`` changes the picture, ``drop`` cuts all connections.
"""

from __future__ import annotations

import sys
import threading

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

PIPELINE = (
    "( videotestsrc name=picture is-live=true pattern=solid-color "
    "! capsfilter name=size caps=video/x-raw,width=128,height=96,framerate=25/1 "
    "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=5 threads=1 "
    "! rtph264pay name=pay0 config-interval=-1 )"
)


class Server:
    """The server, and what it shows."""

    def __init__(self, port: str, *login: str) -> None:
        self.width, self.height, self.color = 128, 96, 0xFFFF0000
        self.elements = []
        self.server = GstRtspServer.RTSPServer(address="127.0.0.1", service=port)
        factory = GstRtspServer.RTSPMediaFactory(launch=PIPELINE, shared=True)
        factory.connect("media-configure", lambda _, media: self.configure(media.get_element()))
        if login:
            auth, token = GstRtspServer.RTSPAuth(), GstRtspServer.RTSPToken()
            token.set_string("media.factory.role", "viewer")
            auth.add_basic(GstRtspServer.RTSPAuth.make_basic(*login), token)
            self.server.set_auth(auth)
            factory.add_role_from_structure(
                Gst.Structure.from_string(
                    "viewer, media.factory.access=(boolean)true, media.factory.construct=(boolean)true"
                )[0]
            )
        self.server.get_mount_points().add_factory("/live", factory)
        self.server.attach(None)

    def configure(self, pipeline) -> None:
        """Takes charge of a new pipeline."""
        self.elements = [pipeline.get_by_name("picture"), pipeline.get_by_name("size")]
        self.show()

    def show(self) -> None:
        """Shows the present picture."""
        if self.elements:
            picture, size = self.elements
            picture.set_property("foreground-color", self.color)
            caps = f"video/x-raw,width={self.width},height={self.height},framerate=25/1"
            size.set_property("caps", Gst.Caps.from_string(caps))

    def command(self, line: str) -> None:
        """Runs a command."""
        if line == "drop":
            self.server.client_filter(lambda *_: GstRtspServer.RTSPFilterResult.REMOVE)
        else:
            width, height, color = line.split()
            self.width, self.height, self.color = int(width), int(height), 0xFF000000 | int(color, 16)
            self.show()


def main() -> None:
    Gst.init(None)
    server, loop = Server(*sys.argv[1:]), GLib.MainLoop()

    def read() -> None:
        for line in sys.stdin:
            GLib.idle_add(server.command, line.strip())
        GLib.idle_add(loop.quit)  # whoever started it is gone

    threading.Thread(target=read, daemon=True).start()
    print(server.server.get_bound_port(), flush=True)
    loop.run()


if __name__ == "__main__":
    main()
