from __future__ import annotations

import logging

import av
import numpy as np
import pytest

from tango_runtime.video import file as video
from tango_runtime.video import open_source, sample
from tests.runtime.video.clips import H264, OPEN_GOP, decode_all, number_in, picture, rejected, write

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


def assert_as_decoded(path, counts=(1, 2, 3, 7, 16)):
    frames = decode_all(path)
    for count in (*counts, len(frames)):
        sampled = list(sample(path, count))
        indices = np.linspace(0, len(frames) - 1, count, dtype=int)
        assert len(sampled) == count
        for (_, rgb), i in zip(sampled, indices, strict=True):
            np.testing.assert_array_equal(rgb, frames[i], err_msg=f"frame {i} of {count}")
    return frames


def damage(path, place):
    """Overwrites a packet of an MP4, so that it does not decode."""
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][place]
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[start + 4 : start + size] = b"\xff" * (size - 4)
    path.write_bytes(data)
    return path


def show(path, a, b, c, d):
    """Gives an MP4 a display matrix: its pixel (x, y) is shown at (a·x + c·y, b·x + d·y)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # past version, times, track, duration, layer, group, volume
    one = 1 << 16
    data[at : at + 36] = np.array([a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(data)


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
    timeline = video._read_timeline(write(tmp_path / "clip.mp4"))
    runs = video._plan_runs(timeline, [0, 30, 59])
    assert [run.start for run in runs] == [0, 24, 48]
    assert sum(run.stop - run.start for run in runs) < 30


def test_a_leading_picture_of_an_open_gop_needs_the_keyframe_before(tmp_path):
    timeline = video._read_timeline(write(tmp_path / "clip.mp4", options={"x264-params": OPEN_GOP}))
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
    path = damage(write(tmp_path / "clip.mp4"), place)
    frames = decode_all(path)
    assert len(frames) == 59
    for (_, rgb), i in zip(sample(path, 2), (0, 58), strict=True):
        np.testing.assert_array_equal(rgb, frames[i])
    rejected(path, 60, "has 59 frames")


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, -1, 1, 0), lambda rgb: np.rot90(rgb, 1)),
        ((-1, 0, 0, -1), lambda rgb: np.rot90(rgb, 2)),
        ((0, 1, -1, 0), lambda rgb: np.rot90(rgb, 3)),
        ((-1, 0, 0, 1), lambda rgb: rgb[:, ::-1]),
        ((1, 0, 0, -1), lambda rgb: rgb[::-1]),
        ((0, 1, 1, 0), lambda rgb: rgb.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda rgb: np.rot90(rgb, 2).transpose(1, 0, 2)),
    ],
)
def test_the_display_matrix_turns_and_mirrors(tmp_path, matrix, shown):
    def corner(number):
        rgb = picture(number).copy()
        rgb[:20, :12] = 200
        return rgb

    path = write(tmp_path / "clip.mp4", draw=corner)
    plain = sample(path, 2)
    expected = [shown(rgb) for _, rgb in plain]
    show(path, *matrix)
    for (_, rgb), right in zip(sample(path, 2), expected, strict=True):
        np.testing.assert_array_equal(rgb, right)
    assert open_source(path).frame_size == expected[0].shape[:2]


@pytest.mark.parametrize("share", [0.5, 0.8, 0.98])
@pytest.mark.parametrize(
    ("suffix", "muxer"),
    [(".mp4", {}), (".mp4", {"movflags": "faststart"}), (".mp4", {"movflags": "frag_keyframe+empty_moov"}),
     (".mkv", {}), (".avi", {})],
)  # fmt: skip
def test_a_truncated_file_is_rejected(tmp_path, suffix, muxer, share):
    path = write(tmp_path / f"clip{suffix}", "mpeg4" if suffix == ".avi" else "libx264", muxer=muxer)
    assert len(list(sample(path, 60))) == 60
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    rejected(path, 4, "clip", "truncated")


@pytest.mark.parametrize(("suffix", "beyond"), [(".mp4", 0), (".mp4", 9), (".flv", 9)])
def test_a_file_cut_at_or_in_a_packet_is_rejected(tmp_path, suffix, beyond):
    path = write(tmp_path / f"clip{suffix}", muxer={"movflags": "faststart"} if suffix == ".mp4" else {})
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][40]
        cut = packet.pos + (packet.size if suffix == ".flv" else 0) + beyond
    path.write_bytes(path.read_bytes()[:cut])
    rejected(path, 4, "truncated")


def test_what_is_no_video_is_rejected(tmp_path):
    rejected(tmp_path / "gone.mp4", 4, "gone.mp4", "does not exist")
    (tmp_path / "empty.mp4").touch()
    rejected(tmp_path / "empty.mp4", 4, "empty.mp4 is empty")
    (tmp_path / "notes.mp4").write_text("The door opens at nine.\n" * 100)
    rejected(tmp_path / "notes.mp4", 4, "notes.mp4", "cannot be read as a video")
    rejected("/dev/null", 4, "/dev/null", "camera")
    with av.open(str(tmp_path / "song.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    rejected(tmp_path / "song.wav", 4, "song.wav", "no video stream")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("vp8, frames never shown", "vp8 is not always one frame"), ("h264 without times", "no times"), ("h264", None)],
)
def test_one_warning_where_the_whole_file_is_decoded(tmp_path, caplog, kind, reason):
    suffix, encoder, options = KINDS[kind]
    source = open_source(write(tmp_path / f"clip{suffix}", encoder, options))
    for count in (2, 60):
        assert len(list(source.read(source.sample(count)))) == count
    warnings = [record for record in caplog.records if record.name == "tango_runtime.video"]
    assert len(warnings) == (reason is not None)
    for warning in warnings:
        assert warning.levelno == logging.WARNING
        text = warning.getMessage()
        assert f"clip{suffix}" in text
        assert reason in text
        assert "60 frames" in text or "6 frames" in text  # VP8 has packets that are not shown
        assert "2.5 s" in text or "2.4 s" in text or "2.6 s" in text


def test_one_warning_where_the_decoder_gives_other_frames_than_the_packets(tmp_path, caplog):
    source = open_source(damage(write(tmp_path / "clip.mp4"), 50))
    assert not caplog.records
    chosen = source.sample(2)
    for _ in range(2):
        assert [number_in(rgb) for _, rgb in source.read(chosen)] == [0, 59]
    (warning,) = caplog.records
    assert (warning.name, warning.levelno) == ("tango_runtime.video", logging.WARNING)
    assert "clip.mp4: the frame at 2.125 s comes out of the decoder unexpectedly" in warning.getMessage()
    assert "60 frames, 2.5 s" in warning.getMessage()
    assert len(source.sample(59)) == 59


def test_times_are_known_before_pixels(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")

    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(video, "_decode", decode)
    source = open_source(path)
    chosen = source.sample(4)
    assert chosen.indices.tolist() == [0, 19, 39, 59]
    np.testing.assert_allclose(chosen.seconds, np.array([0, 19, 39, 59]) / 24)
    assert source.name == str(path)
    assert source.duration == pytest.approx(2.5)
    with pytest.raises(AssertionError, match="decoded"):
        next(source.read(chosen))


def test_the_frame_size_is_that_of_the_frames(tmp_path):
    path = write(tmp_path / "clip.mp4")
    assert open_source(path).frame_size == (48, 64)
    show(path, 0, -1, 1, 0)
    source = open_source(path)
    assert source.frame_size == next(source.read(source.sample(1)))[1].shape[:2] == (64, 48)


def test_a_source_is_read_again(tmp_path):
    source = open_source(write(tmp_path / "clip.mp4"))
    for count in (3, 5, 3):
        indices = np.linspace(0, 59, count, dtype=int).tolist()
        assert [number_in(rgb) for _, rgb in source.read(source.sample(count))] == indices


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".flv", ".ts"])
@pytest.mark.parametrize("trailing", [bytes(1000), b"recorded by a camera" * 9, b"\xff" * 7])
def test_trailing_data_is_no_truncation(tmp_path, suffix, trailing):
    path = write(tmp_path / f"clip{suffix}", "mpeg4" if suffix == ".avi" else "libx264")
    path.write_bytes(path.read_bytes() + trailing)
    assert [number_in(rgb) for _, rgb in sample(path, 60)] == list(range(60))


def test_sound_that_lasts_longer_is_no_truncation(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("libx264", rate=24), container.add_stream("pcm_s16le", rate=8000)
        pictures.width, pictures.height, pictures.pix_fmt, sound.layout = 64, 48, "yuv420p", "mono"
        for i in range(24):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        container.mux(pictures.encode(None))
        for i in range(5):
            second = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            second.rate, second.pts = 8000, 8000 * i
            container.mux(sound.encode(second))
    with av.open(str(path)) as container:
        assert container.duration == pytest.approx(5e6, rel=0.01)
    source = open_source(path)
    assert source.duration == pytest.approx(1, rel=0.01)
    assert [number_in(rgb) for _, rgb in source.read(source.sample(24))] == list(range(24))
