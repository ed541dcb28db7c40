"""Frames carry their number in their pixels, so that a test sees which frame it got."""

from __future__ import annotations

import av
import numpy as np
import pytest
from PIL import Image

from tango_plugins import TangoError
from tango_runtime.video import file as video
from tango_runtime.video import sample

BITS = 8
H264 = {"bf": "3", "g": "12", "sc_threshold": "0"}
OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3"

# Name → file suffix, encoder, encoder options. B-frames wherever the codec has them.
KINDS = {
    "h264": (".mp4", "libx264", H264),
    "h264 in matroska": (".mkv", "libx264", H264),
    "h264 in a transport stream": (".ts", "libx264", H264),
    "h264 open gop": (".mp4", "libx264", {"x264-params": OPEN_GOP}),
    "h264 without keyframes": (".mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}),
    "h264 without times": (".h264", "libx264", H264),
    "hevc open gop": (".mp4", "libx265", {"x265-params": OPEN_GOP + ":log-level=none"}),
    "mpeg4": (".avi", "mpeg4", {"bf": "2", "g": "12"}),
    "mpeg2": (".mpg", "mpeg2video", {"bf": "2", "g": "12"}),
    "vp8, frames never shown": (".webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "12"}),
    "vp9": (".webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
}


def picture(number: int) -> np.ndarray:
    """A grey frame [48, 64, 3] with one black or white column of 8 pixels for each bit of its number."""
    bits = [(number >> b & 1) * 255 for b in range(BITS)]
    return np.repeat(np.broadcast_to(np.repeat(np.uint8(bits), 8)[None, :, None], (48, 64, 1)), 3, axis=2)


def number_in(rgb: np.ndarray) -> int:
    columns = rgb[:, :, 1].reshape(48, BITS, 8).mean(axis=(0, 2))
    return sum(int(column > 127) << b for b, column in enumerate(columns))


def write(path, encoder="libx264", options=None, times=range(60), muxer=None):
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(encoder, rate=24, options=options or H264)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_all(path):
    """Every frame of the video, as a player that starts at the beginning shows them."""
    frames = []
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            try:
                frames += [f.to_ndarray(format="rgb24") for f in packet.decode()]
            except av.InvalidDataError:
                continue
    return frames


def assert_as_decoded(path, counts=(1, 2, 3, 7, 16)):
    frames = decode_all(path)
    for count in (*counts, len(frames)):
        sampled = list(sample(path, count))
        indices = np.linspace(0, len(frames) - 1, count, dtype=int)
        assert len(sampled) == count
        for (_, rgb), i in zip(sampled, indices, strict=True):
            np.testing.assert_array_equal(rgb, frames[i], err_msg=f"frame {i} of {count}")
    return frames


def refused(source, count, *words, **options):
    with pytest.raises(TangoError) as error:
        list(sample(source, count, **options))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_are_those_of_a_full_decode(tmp_path, kind):
    suffix, encoder, options = KINDS[kind]
    path = write(tmp_path / f"clip{suffix}", encoder, options)
    frames = assert_as_decoded(path)
    assert [number_in(f) for f in frames] == list(range(60))


def test_times_are_the_files_own_from_the_first_frame(tmp_path):
    times = [*range(5, 25), *range(40, 80, 3), 200]  # a late start and a variable rate
    path = write(tmp_path / "clip.mkv", times=times)
    sampled = list(sample(path, len(times)))
    assert [number_in(rgb) for _, rgb in sampled] == list(range(len(times)))
    np.testing.assert_allclose([s for s, _ in sampled], (np.array(times) - 5) / 24, atol=1e-3)  # Matroska counts ms
    assert sampled[0][0] == 0.0


def test_a_stream_without_times_takes_them_from_its_rate(tmp_path):
    seconds = [s for s, _ in sample(write(tmp_path / "clip.h264"), 60)]
    np.testing.assert_allclose(np.diff(seconds), seconds[1])


def test_only_what_the_wanted_frames_depend_on_is_decoded(tmp_path):
    timeline = video._read_packets(write(tmp_path / "clip.mp4"))
    runs = video._plan_runs(timeline, [0, 30, 59])
    assert [run.start for run in runs] == [0, 24, 48]
    assert sum(run.stop - run.start for run in runs) < 30


def test_a_leading_picture_of_an_open_gop_needs_the_keyframe_before(tmp_path):
    timeline = video._read_packets(write(tmp_path / "clip.mp4", options={"x264-params": OPEN_GOP}))
    places, times = timeline.keys
    leading = timeline.times.index(times[2]) - 1
    assert timeline.packets[leading] > places[2]
    assert video._plan_runs(timeline, [leading])[0].start == places[1]


@pytest.mark.parametrize(("encoder", "key"), [("libx264", "x264-params"), ("libx265", "x265-params")])
def test_a_cut_that_begins_with_an_open_gop(tmp_path, encoder, key):
    params = OPEN_GOP + (":log-level=none" if encoder == "libx265" else "")
    whole = write(tmp_path / "whole.ts", encoder, {key: params})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.ts"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.size]
        second = [i for i, p in enumerate(packets) if p.is_keyframe][1]
        for packet in packets[second:]:
            packet.stream = stream
            target.mux(packet)
    assert_as_decoded(tmp_path / "cut.ts")


def test_an_edit_list_hides_frames(tmp_path):
    whole = write(tmp_path / "whole.mp4")
    path = tmp_path / "edited.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = int(7 / 24 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    frames = assert_as_decoded(path)
    assert [number_in(f) for f in frames] == list(range(7, 60))
    assert next(sample(path, 2))[0] == 0.0


@pytest.mark.parametrize("place", [20, 59])
def test_a_packet_that_does_not_decode(tmp_path, place):
    path = write(tmp_path / "clip.mp4")
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][place]
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[start + 4 : start + size] = b"\xff" * (size - 4)
    path.write_bytes(data)
    frames = decode_all(path)
    assert len(frames) == 59
    for (_, rgb), i in zip(sample(path, 2), (0, 58), strict=True):
        np.testing.assert_array_equal(rgb, frames[i])
    refused(path, 60, "has 59 frames")


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_display_rotation_is_applied(tmp_path, degrees, turns):
    path = write(tmp_path / "clip.mp4")
    plain = next(sample(path, 1))[1]
    cos, sin = round(np.cos(np.radians(degrees))) << 16, round(np.sin(np.radians(degrees))) << 16
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # past version, times, track, duration, layer, group, volume
    matrix = np.array([cos, -sin, 0, sin, cos, 0, 0, 0, 1 << 30], ">i4")  # a counter-clockwise turn
    data[at : at + 36] = matrix.tobytes()
    path.write_bytes(data)
    np.testing.assert_array_equal(next(sample(path, 1))[1], np.rot90(plain, turns))


@pytest.mark.parametrize("share", [0.5, 0.8, 0.98])
@pytest.mark.parametrize(
    ("suffix", "muxer"),
    [(".mp4", {}), (".mp4", {"movflags": "faststart"}), (".mp4", {"movflags": "frag_keyframe+empty_moov"}),
     (".mkv", {}), (".avi", {})],
)  # fmt: skip
def test_a_truncated_file_is_refused(tmp_path, suffix, muxer, share):
    path = write(tmp_path / f"clip{suffix}", "mpeg4" if suffix == ".avi" else "libx264", muxer=muxer)
    assert len(list(sample(path, 60))) == 60
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, 4, "clip", "truncated")


@pytest.mark.parametrize(("suffix", "beyond"), [(".mp4", 0), (".mp4", 9), (".flv", 9)])
def test_a_file_cut_at_or_in_a_packet_is_refused(tmp_path, suffix, beyond):
    path = write(tmp_path / f"clip{suffix}", muxer={"movflags": "faststart"} if suffix == ".mp4" else {})
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][40]
        cut = packet.pos + (packet.size if suffix == ".flv" else 0) + beyond
    path.write_bytes(path.read_bytes()[:cut])
    refused(path, 4, "truncated")


def test_what_is_no_video_is_refused(tmp_path):
    refused(tmp_path / "gone.mp4", 4, "gone.mp4", "does not exist")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", 4, "empty.mp4 is empty")
    (tmp_path / "notes.mp4").write_text("The door opens at nine.\n" * 100)
    refused(tmp_path / "notes.mp4", 4, "notes.mp4", "cannot be read as a video")
    refused("/dev/null", 4, "/dev/null", "camera")
    with av.open(str(tmp_path / "song.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    refused(tmp_path / "song.wav", 4, "song.wav", "no video stream")


def test_too_few_frames_and_bad_arguments_are_refused(tmp_path):
    path = write(tmp_path / "clip.mp4", times=range(7))
    refused(path, 32, "has 7 frames, 32 were asked for", "--frames 7")
    refused(path, 0, "0 frames")
    refused(path, 4, "fps=2", fps=2)
    refused(np.zeros((4, 8, 8, 3), np.uint8), 4, "fps is 0", fps=0)
    with pytest.raises(TangoError):
        sample(path, 32)  # before the first frame is asked for


def test_arrays(tmp_path):
    frames = np.stack([picture(i) for i in range(10)])
    sampled = list(sample(frames, 4, fps=2))
    assert [(s, number_in(rgb)) for s, rgb in sampled] == [(0.0, 0), (1.5, 3), (3.0, 6), (4.5, 9)]
    assert [s for s, _ in sample(frames, 2)] == [0.0, 9.0]
    refused(frames.astype(np.float32), 4, "float32", "uint8")
    refused(frames[0], 1, "[48, 64, 3]")
    refused(frames[..., :1], 1, "[10, 48, 64, 1]")
    refused(frames[:0], 1, "no frames")


def test_iterables():
    timed = [(10 + 0.5 * i, picture(i)) for i in range(10)]
    for source in (timed, iter(timed)):
        assert [(s, number_in(rgb)) for s, rgb in sample(source, 4)] == [(0.0, 0), (1.5, 3), (3.0, 6), (4.5, 9)]
    refused(timed, 4, "fps", fps=1)
    refused([timed[0], timed[0]], 1, "do not ascend", "frame 1")
    refused([(float("nan"), picture(0))], 1, "do not ascend")
    refused([picture(0)], 1, "item 0")
    refused([(0.0, picture(0).astype(np.float32))], 1, "frame 0 is float32")
    refused([], 1, "no frames")


def test_a_folder_of_images_in_natural_order(tmp_path):
    for i in range(12):
        Image.fromarray(picture(i)).save(tmp_path / f"frame{i}.{'png' if i % 2 else 'BMP'}")
    (tmp_path / "notes.txt").touch()
    assert [(s, number_in(rgb)) for s, rgb in sample(tmp_path, 12)] == [(float(i), i) for i in range(12)]
    assert [s for s, _ in sample(str(tmp_path), 2, fps=4)] == [0.0, 2.75]
    (tmp_path / "frame3.png").write_bytes(b"no image")
    refused(tmp_path, 12, "frame3.png")
    refused(tmp_path, 13, "has 12 frames")


def test_images_become_rgb(tmp_path):
    Image.fromarray(picture(5)[:, :, 0]).save(tmp_path / "0.png")
    Image.fromarray(picture(6)).convert("RGBA").save(tmp_path / "1.png")
    Image.fromarray(picture(7)).convert("P").save(tmp_path / "2.png")
    for i, (_, rgb) in enumerate(sample(tmp_path, 3)):
        np.testing.assert_array_equal(rgb, picture(5 + i))
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "3.png")
    refused(tmp_path, 4, "3.png", "8 bits")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", 1, "none", "no images")
