"""What a client may name, and what it may not: files, addresses, redirects, playlists, sizes."""

from __future__ import annotations

import base64
import http.server
import signal
import socket
import struct
import threading
import time
import zlib

import pytest

from tango_runtime.server import media
from tango_runtime.server.chat import Media
from tango_runtime.server.errors import ApiError
from tango_runtime.server.fetch import _is_public, fetch
from tango_runtime.server.settings import Settings
from tests.runtime.server.serving import asked, openai


@pytest.fixture(scope="module")
def web(clip):
    """A web server on the loopback: its URL."""
    video = clip.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if self.path == "/clip.mp4":
                self._give(200, video)
            elif self.path.startswith("/to/"):
                self._give(302, b"", Location=self.path.removeprefix("/to/"))
            elif self.path == "/loop":
                self._give(302, b"", Location="/loop")
            elif self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            elif self.path == "/slow-header":
                for _ in range(100):
                    self.wfile.write(b"H")
                    time.sleep(0.05)
            elif self.path == "/large":
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                for _ in range(64):
                    self.wfile.write(bytes(1 << 16))
                self.close_connection = True
            elif self.path == "/cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"cut")
                self.close_connection = True
            elif self.path == "/lie":
                self.send_response(200)
                self.send_header("Content-Length", "99999999999")
                self.end_headers()
            else:
                self._give(404, b"")

        def _give(self, status, body, **headers):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

        def handle(self):
            try:
                super().handle()
            except OSError:  # the client had enough
                self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(url, tmp_path, seconds=10, **options):
    deadline = time.monotonic() + seconds
    fetch(url, tmp_path / "got", **{"most": 1 << 20, "deadline": deadline, "allow_private": True, **options})
    return (tmp_path / "got").read_bytes()


def test_a_url_is_fetched_also_over_redirects(web, clip, tmp_path):
    for path in ("/clip.mp4", "/to/clip.mp4", f"/to/{web}/to/clip.mp4"):
        target = path.replace("/to/clip.mp4", "/to//clip.mp4")
        assert get(f"{web}{target}", tmp_path) == clip.read_bytes()


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("/none", {}, "answers with status 404"),
        ("/loop", {}, "is redirected more than 5 times"),
        ("/slow", {"seconds": 0.3}, "it takes too long"),
        ("/slow-header", {"seconds": 0.3}, "it takes too long"),
        ("/large", {}, "has more than 1 MB"),
        ("/lie", {}, "has more than 1 MB"),
        ("/to/file:///etc/passwd", {}, "is no http: or https: URL"),
        ("/to/ftp://127.0.0.1/", {}, "is no http: or https: URL"),
        ("/to/http://[", {}, r"is redirected to 'http://\[', which is no URL"),
        ("/cut", {}, "ended after 3 of 1000 bytes"),
        ("/clip.mp4", {"allow_private": False}, "has an address that is not public"),
    ],
)
def test_what_a_url_may_not_give(web, tmp_path, path, options, message):
    with pytest.raises(ApiError, match=message):
        get(f"{web}{path}", tmp_path, **options)


def test_the_limits_are_for_all_images_together(monkeypatch):
    limits = []

    def fetched(url, to, *, most, deadline, allow_private):
        limits.append((most, deadline))
        to.write_bytes(bytes(60))

    monkeypatch.setattr(media, "fetch", fetched)
    store = media.MediaStore(Settings(max_images=3, max_media=100))
    try:
        with pytest.raises(ApiError, match="there are 4 images; at most 3 are taken"):
            store.local(Media(("data:video/png;base64,AA==,AA==,AA==,AA==",))).__enter__()
        with pytest.raises(ApiError, match="the media have more than"):
            store.local(Media(("http://a/", "http://b/", "http://c/"), images=True)).__enter__()
    finally:
        store.close()
    (first, deadline), (second, the_same) = limits  # the third is not asked for
    assert (first, second) == (100, 40)
    assert deadline == the_same


def test_every_redirect_and_every_address_is_checked(web, tmp_path, monkeypatch):
    """A public name that leads to a private address, at once, by a redirect, or as one of several."""
    port = int(web.rpartition(":")[2])
    addresses = {"public.example": ["93.184.216.34"], "mixed.example": ["93.184.216.34", "10.0.0.1"]}
    asked_for, connected = [], []

    def resolve(host, port, *arguments, **options):
        asked_for.append(host)
        found = addresses.get(host, [host])
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    real = socket.create_connection

    def connect(address, *arguments, **options):
        connected.append(address)
        return real(("127.0.0.1", port), *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ApiError, match=r"127\.0\.0\.1 has an address that is not public"):
        get(f"http://public.example/to/{web}/clip.mp4", tmp_path, allow_private=False)
    assert connected == [("93.184.216.34", 80)]  # the address that was checked, not the name
    with pytest.raises(ApiError, match=r"mixed\.example has an address that is not public"):
        get("http://mixed.example/clip.mp4", tmp_path, allow_private=False)
    assert asked_for.count("mixed.example") == 1


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("::ffff:93.184.216.34", True),
        *[(address, False) for address in ("127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1")],
        *[(address, False) for address in ("0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0")],
        *[
            (address, False)
            for address in ("fd00::1", "ff02::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::")
        ],
    ],
)
def test_public_addresses(address, public):
    assert _is_public(address) == public


def test_private_addresses_are_fetched_only_where_allowed(served, serving, web, llm, clip):
    body = asked(url=f"{web}/clip.mp4")
    with pytest.raises(openai.BadRequestError, match="has an address that is not public"):
        served.openai().chat.completions.create(**body)
    found = serving(allow_private=True).openai().chat.completions.create(**body)
    assert found.choices[0].message.content == llm.generate(clip, "What happens?", max_new_tokens=8).text


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "file:../x.mp4", "file:link.mp4", "file:%2e%2e/x", "file:none.mp4", "file:.", "file:a%00b"],
)
def test_only_files_under_the_media_root(served, url):
    with pytest.raises(openai.NotFoundError, match="there is no such file under the media root"):
        served.openai().chat.completions.create(**asked(url=url))


def test_a_file_by_its_whole_path(served, media_root):
    assert served.openai().chat.completions.create(**asked(url=f"file://{media_root}/clip.mp4")).choices


def test_without_a_media_root_no_file(serving):
    with pytest.raises(openai.PermissionDeniedError, match="without --media-root"):
        serving(media_root=None).openai().chat.completions.create(**asked())


def as_data(data, kind="video/mp4"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PLAYLIST = b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n"


def bomb():
    """A PNG of 60,000×60,000 pixels in some hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def test_media_that_read_elsewhere_or_are_none_are_refused(served, media_root, web):
    secret = str(media_root / "clip.mp4")
    texts = [
        PLAYLIST.replace(b"{}", f"{web}/clip.mp4".encode()),
        PLAYLIST.replace(b"{}", b"clip.mp4"),
        f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 9 RTP/AVP 26\r\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>',
        b"<smil><body><video src='" + secret.encode() + b"'/></body></smil>",
        b"hello, world\n" * 100,
        b"\x00" * 1000,
        b"GIF89a",
    ]
    for text in texts:
        with pytest.raises(openai.BadRequestError, match=r"the video|no video") as caught:
            served.openai().chat.completions.create(**asked(url=as_data(text)))
        assert secret not in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="image 0 is of no known format"):
        served.openai().chat.completions.create(**asked(url=as_data(b"none", "image/png")))
    with pytest.raises(openai.BadRequestError, match=r"60000×60000 pixels|cannot be read"):
        served.openai().chat.completions.create(**asked(url=as_data(bomb(), "image/png")))
    assert served.openai().chat.completions.create(**asked()).choices  # it lives


def test_a_damaged_video_is_an_error_and_the_decoder_lives(served, clip):
    data = bytearray(clip.read_bytes())
    for begin in range(200, len(data), 997):
        data[begin] ^= 0xFF
    with pytest.raises(openai.BadRequestError):
        served.openai().chat.completions.create(**asked(url=as_data(bytes(data[: len(data) // 2]))))
    assert served.openai().chat.completions.create(**asked()).choices


def test_a_decoder_that_hangs_or_dies_is_replaced(serving, clip, llm):
    served = serving(decode_seconds=61.0)  # no other test's
    decoders = served.service.decoders
    (process,) = decoders._all
    process.kill()
    process.wait()
    wanted = llm.generate(clip, "What happens?", max_new_tokens=8).text
    assert served.openai().chat.completions.create(**asked()).choices[0].message.content == wanted
    (process,) = decoders._all
    process.send_signal(signal.SIGSTOP)
    decoders._seconds = 0.2
    with pytest.raises(openai.BadRequestError, match=r"decoding the video takes more than 0\.2 s"):
        served.openai().chat.completions.create(**asked(), extra_body={"frames": 3})
    decoders._seconds = 60.0
    assert served.openai().chat.completions.create(**asked(), extra_body={"frames": 3}).choices


def test_uploads_are_bounded(serving, clip):
    served = serving(uploads=len(clip.read_bytes()) * 2)
    http, video = served.http(headers={"Content-Type": "video/mp4"}), clip.read_bytes()
    names = [http.post("/v1/videos", content=video + bytes(extra)).json()["id"] for extra in range(3)]
    assert len(set(names)) == 3
    with pytest.raises(openai.NotFoundError, match="upload it again"):
        served.openai().chat.completions.create(**asked(url=names[0]))
    assert served.openai().chat.completions.create(**asked(url=names[2])).choices
    assert len(list(served.service.store.folder.iterdir())) == 1
    assert http.post("/v1/videos", content=b"").status_code == 400
    assert served.http().post("/v1/videos", content=video, headers={"Content-Type": "text/html"}).status_code == 415


def test_no_file_is_left_of_a_request(served, data_url):
    served.openai().chat.completions.create(**asked(url=data_url))
    with pytest.raises(openai.BadRequestError):
        served.openai().chat.completions.create(**asked(url=as_data(b"nothing")))
    kept = set(served.service.store._uploads.values())
    assert set(served.service.store.folder.iterdir()) <= kept
