from __future__ import annotations

import gc
import io
import logging
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from tango_runtime.video import decoding, open_source, sample, timeline
from tango_runtime.video import file as video
from tango_runtime.video.container import decode, demux
from tango_runtime.video.decoding import DisagreementError, plan_runs
from tango_runtime.video.h264 import has_slice, is_disposable
from tango_runtime.video.source import Sampled
from tango_runtime.video.timeline import read_timeline
from tests.runtime.video import fields_h264
from tests.runtime.video.clips import H264, OPEN_GOP, decode_all, number_in, picture, rejected, show, write

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
    "av1": (".webm", "libsvtav1", {"g": "12", "preset": "12"}),
    "flv1": (".flv", "flv", {"g": "12"}),
    "wmv": (".wmv", "wmv2", {"g": "12"}),
    "a codec that is rare": (".avi", "ffvhuff", {"pred": "left"}),
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
    """Overwrites a packet of an MP4 after the head of its slice, so that it does not decode."""
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][place]
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[start + 5 : start + size] = b"\xff" * (size - 5)
    path.write_bytes(data)
    return path


def rewrite(source, target, change):
    """Copies a video's packets, each as change(place, content) → (content, whether it is marked as a keyframe)."""
    with av.open(str(source)) as a, av.open(str(target), "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for i, packet in enumerate(p for p in a.demux(video=0) if p.size):
            content, is_keyframe = change(i, bytes(packet))
            changed = av.Packet(content)
            changed.stream, changed.time_base, changed.is_keyframe = stream, packet.time_base, is_keyframe
            changed.pts, changed.dts, changed.duration = packet.pts, packet.dts, packet.duration
            b.mux(changed)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_are_those_of_a_full_decode(tmp_path, kind):
    suffix, encoder, options = KINDS[kind]
    path = write(tmp_path / f"clip{suffix}", encoder, options)
    frames = assert_as_decoded(path)
    assert [number_in(f) for f in frames] == list(range(60))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cores", [1, 5])
def test_the_frames_are_the_same_on_any_cores_where_far_packets_are_sought(tmp_path, kind, cores, monkeypatch):
    monkeypatch.setattr(decoding, "_cores", lambda: cores)
    monkeypatch.setattr(decoding, "_FAR", 8)
    suffix, encoder, options = KINDS[kind]
    assert_as_decoded(write(tmp_path / f"clip{suffix}", encoder, options))


@pytest.fixture
def by_index(monkeypatch):
    """Reads short files as long ones are read."""
    monkeypatch.setattr(timeline, "_MANY", 30)
    monkeypatch.setattr(timeline, "_LOOK", 16)
    monkeypatch.setattr(decoding, "_FAR", 8)


@pytest.mark.parametrize("kind", [kind for kind, (suffix, *_) in KINDS.items() if suffix == ".mp4"])
def test_a_long_file_is_read_by_its_index(tmp_path, kind, by_index):
    suffix, encoder, options = KINDS[kind]
    path = write(tmp_path / f"clip{suffix}", encoder, options)
    assert read_timeline(path).is_from_index
    assert_as_decoded(path)
    np.testing.assert_array_equal(read_timeline(path).seconds, read_timeline(path, by_index=False).seconds)


def test_keyframes_by_the_index_are_decoded_alone(tmp_path, by_index):
    path = write(tmp_path / "clip.mp4")
    found = read_timeline(path)
    assert found.slack
    chosen = [found.index(key.pts) for key in found.keys]
    assert [run.stop - run.start for run in plan_runs(found, chosen)] == [1] * len(chosen)
    whole = dict(sample(path, len(found.times)))
    for seconds, frame in sample(path, len(chosen), sampling="keyframes"):
        np.testing.assert_array_equal(frame, whole[seconds])


def test_an_index_is_not_believed_where_decoding_shows_another_time(tmp_path, by_index):
    """Decoding times are even here, those of presentation are not: a frame is shown late."""
    path = write(tmp_path / "clip.mp4")
    with av.open(str(path)) as source, av.open(str(tmp_path / "late.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.size]
        order = sorted(p.pts for p in packets)
        late = {order[36]: order[36] + 100}
        for packet in packets:
            packet.pts, packet.stream = late.get(packet.pts, packet.pts), stream
            target.mux(packet)
    path = tmp_path / "late.mp4"
    assert read_timeline(path).is_from_index
    assert_as_decoded(path)
    exact = read_timeline(path, by_index=False).seconds
    np.testing.assert_array_equal([seconds for seconds, _ in sample(path, 60)], exact)


@pytest.mark.parametrize("times", [[*range(40), *range(50, 70)], range(0, 120, 2)])
def test_times_by_the_index_are_those_of_the_packets(tmp_path, times, by_index):
    path = write(tmp_path / "clip.mp4", times=times)
    assert_as_decoded(path)
    np.testing.assert_array_equal(read_timeline(path).seconds, read_timeline(path, by_index=False).seconds)


def test_damage_is_found_in_a_file_that_is_read_by_its_index(tmp_path, by_index):
    path = damage(write(tmp_path / "clip.mp4"), 20)
    assert_as_decoded(path, counts=(1, 2, 16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 7, 60])
def test_the_nearest_keyframe_of_each_frame(tmp_path, kind, count):
    suffix, encoder, options = KINDS[kind]
    path = write(tmp_path / f"clip{suffix}", encoder, options)
    frames, found = decode_all(path), read_timeline(path)
    exact = np.linspace(0, 59, count, dtype=int)
    if found.keys:  # else every frame was decoded, and the exact ones are taken
        keys = [found.index(key.pts) for key in found.keys]
        right = [min(keys, key=lambda k: (abs(found.seconds[k] - found.seconds[i]), k)) for i in exact]
    else:
        right = exact
    stream = sample(path, count, sampling="keyframes")
    for (seconds, rgb), i in zip(stream, right, strict=True):
        np.testing.assert_array_equal(rgb, frames[i])
        assert seconds == found.seconds[i]
    np.testing.assert_allclose(stream.off, found.seconds[right] - found.seconds[exact])
    assert sample(path, count).off is None


def test_a_keyframe_is_all_that_is_decoded_of_its_group(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")
    decoded = []
    monkeypatch.setattr(decoding, "decode", lambda stream, packets: decode(stream, decoded_of(packets)))

    def decoded_of(packets):
        for packet in packets:
            decoded.append(packet.is_keyframe)
            yield packet

    assert len(list(sample(path, 4, sampling="keyframes"))) == 4
    assert decoded == [True] * 4


def test_an_error_on_one_of_several_decoders_ends_all(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")
    monkeypatch.setattr(decoding, "_cores", lambda: 5)
    found = read_timeline(path)

    def use(frame):
        if number_in(frame.to_ndarray(format="rgb24")) == 30:
            raise ValueError("this one")
        return frame.pts

    threads = _threads()
    with pytest.raises(ValueError, match="this one"):
        list(decoding.decode_frames(path, found, range(60), decoding.software(1, seek=True, sparse=True), use))
    stopped = decoding.decode_frames(
        path, found, range(60), decoding.software(1, seek=True, sparse=True), lambda frame: frame.pts
    )
    next(stopped)
    stopped.close()
    assert_threads_end(threads)


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
    found = read_timeline(write(tmp_path / "clip.mp4"))
    runs = plan_runs(found, [0, 30, 59])
    assert [run.start for run in runs] == [0, 24, 48]
    assert sum(run.stop - run.start for run in runs) < 30


def test_a_leading_picture_of_an_open_gop_needs_the_keyframe_before(tmp_path):
    found = read_timeline(write(tmp_path / "clip.mp4", options={"x264-params": OPEN_GOP}))
    leading = found.times.index(found.keys[2].pts) - 1
    assert found.packets[leading] > found.keys[2].place
    assert plan_runs(found, [leading])[0].start == found.keys[1].place


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


@pytest.mark.parametrize(("orientation", "shown"), [(1, lambda rgb: rgb), (6, lambda rgb: np.rot90(rgb, 3))])
def test_a_cameras_jpegs_are_turned_as_their_exif_says(tmp_path, orientation, shown):
    """PyAV does not know the kind of side data that FFmpeg makes of them."""
    exif, corner = Image.Exif(), picture(5).copy()
    exif[0x112], corner[:20, :12] = orientation, 200
    jpeg = io.BytesIO()
    Image.fromarray(corner).save(jpeg, "JPEG", quality=98, exif=exif)
    plain = write(tmp_path / "plain.avi", "mjpeg", {"strict": "unofficial"}, times=range(3))
    path = rewrite(plain, tmp_path / "clip.avi", lambda i, content: (jpeg.getvalue(), True))
    for _, rgb in sample(path, 3):
        np.testing.assert_allclose(rgb, shown(corner).astype(int), atol=40)


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
    [
        ("a codec that is rare", "ffvhuff is not always one frame"),
        ("h264 without times", "no times"),
        ("h264", None),
        ("vp8, frames never shown", None),
        ("av1", None),
    ],
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
        assert "60 frames" in text
        assert "2.5 s" in text or "2.4 s" in text or "2.6 s" in text


def test_a_warning_where_the_decoder_gives_other_frames_than_the_packets_and_one_of_what_is_lost(tmp_path, caplog):
    source = open_source(damage(write(tmp_path / "clip.mp4"), 50))
    assert not caplog.records
    chosen = source.sample(2)
    for _ in range(2):
        assert [number_in(rgb) for _, rgb in source.read(chosen)] == [0, 59]
    warning, lost = caplog.records
    assert (warning.name, warning.levelno) == ("tango_runtime.video", logging.WARNING)
    assert "clip.mp4: packets that do not decode: 1; frames are taken from the 59 that are left" in lost.getMessage()
    assert "clip.mp4: the frame at 2.125 s comes out of the decoder unexpectedly" in warning.getMessage()
    assert "60 frames, 2.5 s" in warning.getMessage()
    assert len(source.sample(59)) == 59


def test_times_are_known_before_pixels(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")

    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(decoding, "decode", decode)
    monkeypatch.setattr(timeline, "decode", decode)
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


def test_a_recording_to_a_pipe_and_a_wrong_riff_size_are_no_truncation(tmp_path):
    path = write(tmp_path / "clip.avi", "mpeg4")
    data = bytearray(path.read_bytes())
    for size in (len(data) + 1000, 0xFFFFFFFF, 0):
        data[4:8] = size.to_bytes(4, "little")
        path.write_bytes(data)
        assert [number_in(rgb) for _, rgb in sample(path, 60)] == list(range(60))
    data[4:8] = (len(data) + 1000).to_bytes(4, "little")
    path.write_bytes(data[: data.rindex(b"idx1") + 100])
    rejected(path, 4, "truncated")


def _chunk(name, content):
    return name + len(content).to_bytes(4, "little") + content


def test_an_avi_whose_sizes_are_all_wrong_is_whole_with_its_index(tmp_path):
    path = write(tmp_path / "clip.avi", "mpeg4")
    data = bytearray(path.read_bytes())
    frames = data.index(b"movi") - 4
    data[4:8] = (1 << 30).to_bytes(4, "little")
    for size in (0, 1 << 30):
        data[frames : frames + 4] = size.to_bytes(4, "little")
        path.write_bytes(data)
        assert [number_in(rgb) for _, rgb in sample(path, 60)] == list(range(60))
    path.write_bytes(data[: data.rindex(b"idx1") + 100])
    rejected(path, 4, "truncated")


def test_a_long_avi_that_is_cut_in_a_later_part_is_rejected(tmp_path):
    """Beyond a gigabyte an AVI has further RIFF chunks, which the first one's size says nothing of."""
    path = write(tmp_path / "clip.avi", "mpeg4")
    whole = path.read_bytes() + _chunk(b"RIFF", b"AVIX" + _chunk(b"LIST", b"movi" + _chunk(b"00dc", bytes(1000))))
    path.write_bytes(whole)
    assert len(list(sample(path, 4))) == 4
    path.write_bytes(whole[:-1])
    rejected(path, 4, "truncated", f"{len(whole) - 1} of {len(whole)} bytes")


def test_a_title_that_is_not_utf_8(tmp_path):
    path = write(tmp_path / "clip.avi", "mpeg4")
    data = bytearray(path.read_bytes())
    at = data.index(b"ISFT") + 8  # the software's name
    data[at : at + 4] = "\u52d5\u753b".encode("shift_jis")
    path.write_bytes(data)
    assert [number_in(rgb) for _, rgb in sample(path, 60)] == list(range(60))


def test_a_stream_that_is_found_late_does_not_end_the_video():
    class Container:
        packets = iter(range(1, 6))

        def demux(self, stream):
            for number in self.packets:
                if number == 3:
                    raise IndexError("list index out of range")  # as PyAV does; the packet of the new stream is lost
                yield SimpleNamespace(size=number)

    assert [packet.size for packet in demux(Container(), None)] == [1, 2, 4, 5]


@pytest.mark.parametrize("name", ["10:30:15.mp4", "C:clip.mp4", "concat:clip.mp4", "-.mp4", "%03d.mp4"])
def test_a_path_is_a_path(tmp_path, monkeypatch, name):
    write(tmp_path / "whole.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert [number_in(rgb) for _, rgb in sample(name, 60)] == list(range(60))


def test_a_pattern_in_a_name_is_no_pattern(tmp_path):
    for name, number in (("0.png", 8), ("1.png", 9), ("%d.png", 7)):
        Image.fromarray(picture(number)).save(tmp_path / name)
    assert [number_in(rgb) for _, rgb in sample(tmp_path / "%d.png", 1)] == [7]
    rejected(tmp_path / "%d.png", 2, "has 1 frame")


def test_lists_and_texts_are_no_videos(tmp_path):
    write(tmp_path / "other.mp4")
    (tmp_path / "clip.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    rejected(tmp_path / "clip.mp4", 2, "clip.mp4 is a list of other files")
    (tmp_path / "notes.txt").write_text("The door opens at nine.\n" * 1500)
    rejected(tmp_path / "notes.txt", 2, "notes.txt is a text")
    (tmp_path / "live.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n")
    rejected(tmp_path / "live.m3u8", 2, "playlist that has no end", "#EXT-X-ENDLIST")


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["#EXTINF:2.5", "part.ts"], None),
        (["#EXTINF:2.5", "../part.ts"], "../part.ts"),
        (["#EXTINF:2.5", "/etc/part.ts"], "/etc/part.ts"),
        (["#EXTINF:2.5", "http://host/part.ts"], "http://host/part.ts"),
        (['#EXT-X-MAP:URI="../part.mp4"', "#EXTINF:2.5", "part.ts"], "../part.mp4"),
        (["#EXT-X-STREAM-INF:BANDWIDTH=1", "outside.m3u8"], "outside.m3u8 is a playlist that names ../part.ts"),
    ],
)
def test_a_playlist_names_files_of_its_folder_only(tmp_path, lines, named):
    write(tmp_path / "part.ts")
    for name, content in (("list.m3u8", lines), ("outside.m3u8", ["../part.ts"])):
        (tmp_path / name).write_text("\n".join(["#EXTM3U", "#EXT-X-TARGETDURATION:3", *content, "#EXT-X-ENDLIST"]))
    if named:
        rejected(tmp_path / "list.m3u8", 2, named)
    else:
        assert [number_in(rgb) for _, rgb in sample(tmp_path / "list.m3u8", 60)] == list(range(60))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["#EXT-X-ENDLIST", "#EXT-X-TARGETDURATION:3", "#EXTINF:2.5", "part.ts"], "has no end"),
        (["#EXT-X-TARGETDURATION:3", "#EXTINF:2.5", "part.ts", "# #EXT-X-ENDLIST"], "has no end"),
        (["#EXT-X-TARGETDURATION:3", "#EXTINF:2.5,#EXT-X-ENDLIST", "part.ts"], "has no end"),
        (["#EXT-X-TARGETDURATION:3", "#EXTINF:2.5,#EXT-X-STREAM-INF:", "part.ts"], "has no end"),
        (["#EXT-X-STREAM-INF:BANDWIDTH=1", "#EXTINF:2.5", "part.ts"], "of videos and of playlists"),
        (["#EXT-X-STREAM-INF:BANDWIDTH=1", "list.m3u8"], "of playlists, which another one names"),
        (["#EXT-X-MEDIA:TYPE=AUDIO,URI=live.m3u8", "#EXT-X-STREAM-INF:BANDWIDTH=1", "part.ts"], "live.m3u8"),
        (["#EXT-X-MAP:URI=/etc/part", "#EXTINF:2.5", "part.ts", "#EXT-X-ENDLIST"], "names /etc/part"),
    ],
)
def test_a_playlist_that_ffmpeg_would_read_for_ever_is_rejected(tmp_path, lines, words):
    (tmp_path / "part.ts").touch()
    (tmp_path / "live.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:3\n")
    (tmp_path / "list.m3u8").write_text("\n".join(["#EXTM3U", *lines]))
    rejected(tmp_path / "list.m3u8", 2, "playlist", words)


def test_an_animated_webp_is_decoded_or_rejected_by_name(tmp_path):
    """FFmpeg decodes it from 8.1 on, which PyAV 19 has."""
    made = Image.fromarray(picture(0)), Image.fromarray(picture(1))
    made[0].save(tmp_path / "clip.webp", save_all=True, append_images=made[1:], duration=100, lossless=True)
    if "webp_anim" not in av.codecs_available:
        rejected(tmp_path / "clip.webp", 2, "clip.webp", "animated", "WebP")
        return
    frames = [frame for _, frame in sample(tmp_path / "clip.webp", 2)]
    np.testing.assert_allclose(np.stack(frames), np.stack([picture(0), picture(1)]), atol=2)


def test_an_encrypted_video_is_rejected(tmp_path):
    """FFmpeg draws the initialization vector at random, so some packets decode to noise and others do not decode."""
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb"}
    write(tmp_path / "clip.mp4", muxer={**key, "encryption_kid": "a7e61c373e219033c21091fa607bf3b8"})
    rejected(tmp_path / "clip.mp4", 2, "the video of", "clip.mp4 is encrypted")


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    cover = io.BytesIO()
    Image.fromarray(picture(0)).save(cover, "JPEG")
    body = b"\0image/jpeg\0\3\0" + cover.getvalue()
    tag = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    with av.open(str(path), "w", options={"id3v2_version": "0", "write_xing": "0"}) as container:
        sound = container.add_stream("libmp3lame", rate=44100, layout="mono")
        for i in range(10):
            block = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16p", layout="mono")
            block.sample_rate, block.pts = 44100, 1152 * i
            container.mux(sound.encode(block))
        container.mux(sound.encode(None))
    path.write_bytes(b"ID3\3\0\0" + size + tag + path.read_bytes())
    rejected(path, 1, "song.mp3", "no video stream", "cover picture")


def test_h264_with_b_frames_in_avi(tmp_path, caplog):
    """AVI has no presentation times: FFmpeg makes them up in decoding order."""
    frames = list(sample(write(tmp_path / "clip.avi"), 60))
    assert [number_in(rgb) for _, rgb in frames] == list(range(60))
    np.testing.assert_allclose([seconds for seconds, _ in frames], np.arange(60) / 24, atol=1e-9)
    assert any("step back" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("times", "right"),
    [
        ([0, 40, 80, 80, 120], [0, 40, 80, 80, 120]),
        ([0, 3, 1, 2, 7, 5, 6, 4], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([0, 10, 20, 30, 0, 10, 20], [0, 10, 20, 30, 30, 40, 50]),
        ([*range(100), *range(50, 60)], [*range(100), *range(99, 109)]),
    ],
)
def test_times_that_repeat_or_step_back(times, right):
    assert timeline._ascending(times) == right


def test_a_bad_packet_late_in_a_file(tmp_path):
    path = damage(write(tmp_path / "clip.mp4", times=range(120)), 100)
    frames = [number_in(rgb) for rgb in decode_all(path)]
    assert len(frames) == 119
    for count in (4, 8, 32):
        sampled = list(sample(path, count))
        of = 119 if count == 32 else 120  # none of fewer frames depends on that packet, so it stays unnoticed
        right = np.linspace(0, of - 1, count, dtype=int).tolist()
        assert [number_in(rgb) for _, rgb in sampled] == [frames[i] if of == 119 else i for i in right]
        np.testing.assert_allclose([s for s, _ in sampled], [number_in(rgb) / 24 for _, rgb in sampled])


def test_a_bad_packet_of_a_codec_that_calls_it_an_argument(tmp_path):
    path = tmp_path / "clip.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("prores_ks", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv422p10le"
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    damaged = rewrite(path, tmp_path / "damaged.mov", lambda i, c: (c[:8] + bytes(len(c) - 8) if i == 5 else c, True))
    assert [number_in(rgb) for _, rgb in sample(damaged, 9)] == [0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("suffix", "encoder"), [(".mp4", "mpeg4"), (".avi", "flv"), (".wmv", "wmv2"), (".mp4", "libx264")]
)
@pytest.mark.parametrize("every", [1, 10])
def test_packets_that_are_marked_as_keyframes_and_are_none(tmp_path, suffix, encoder, every):
    """As recorders write them; some decoders begin anywhere, with gray."""
    plain = write(tmp_path / f"plain{suffix}", encoder, {"g": "60", "bf": "0"})
    assert_as_decoded(rewrite(plain, tmp_path / f"clip{suffix}", lambda i, content: (content, i % every == 0)))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_packets_without_a_picture_are_no_frames(tmp_path, suffix):
    message = b"\0\0\0\4\6\5\0\x80"  # of user data
    plain = write(tmp_path / f"plain{suffix}", options={"g": "12", "bf": "0"})
    path = tmp_path / f"clip{suffix}"
    rewrite(plain, path, lambda i, content: (message if i in (50, 52, 53) else content, i % 12 == 0))
    assert len(assert_as_decoded(path, (2, 4))) == 57


@pytest.mark.parametrize(
    ("codec", "extradata", "packet", "expected"),
    [
        ("h264", b"\1\0\0\0\xff", b"\0\0\0\1\6\0\0\0\1\5", True),
        ("h264", b"\1\0\0\0\xff", b"\0\0\0\1\6\0\0\0\1\7", False),
        ("h264", b"\1\0\0\0\xff", b"\0\0\0\1\6\0\0\0\2\7", True),  # longer than the packet
        ("h264", b"\1\0\0\0\xfd", b"\0\1\x09\0\1\x41", True),
        ("h264", b"\0\0\0\1\x67", b"\0\0\0\1\x09\0\0\1\x61", True),
        ("h264", b"\0\0\0\1\x67", b"\0\0\0\1\x09\0\0\1\x06\x61", False),
        ("h264", None, b"no unit", True),
        ("hevc", b"\1" + bytes(20) + b"\3", b"\0\0\0\1\x26", True),
        ("hevc", b"\1" + bytes(20) + b"\3", b"\0\0\0\1\x4e", False),
    ],
)
def test_which_packets_have_a_picture(codec, extradata, packet, expected):
    assert has_slice(packet, codec, extradata) == expected


@pytest.mark.parametrize(
    ("encoder", "options"), [("libx264", {}), ("libx264", {"x264-params": "b-pyramid=none"}), ("mpeg4", {})]
)
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_times_of_decoding_are_not_taken_for_times_of_presentation(tmp_path, encoder, options, suffix, monkeypatch):
    """Even where no frame comes out of the decoder before the sampled one that is not due."""
    monkeypatch.setattr(timeline, "_MANY", 70)  # so the index of the MP4 is read
    plain = write(tmp_path / f"plain{suffix}", encoder, {"bf": "3", "g": "12", **options}, times=range(80))
    path = tmp_path / f"clip{suffix}"
    with av.open(str(plain)) as a, av.open(str(path), "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for i, packet in enumerate(p for p in a.demux(video=0) if p.size):
            packet.stream, packet.pts, packet.dts = stream, 40 * i, 40 * i
            b.mux(packet)
    for i in range(4):
        source = open_source(path)
        chosen = Sampled(np.array([i]), source.sample(80).seconds[[i]], "floor")
        assert [number_in(rgb) for _, rgb in source.read(chosen)] == [i]
    assert_as_decoded(path)


@pytest.mark.parametrize("limit", [0, 9 * 64 * 48, video._MAX_HELD])
def test_frames_that_are_too_large_to_be_held_are_decoded_again(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(video, "_MAX_HELD", limit)
    assert_as_decoded(write(tmp_path / "clip.mp4"))
    assert_as_decoded(write(tmp_path / "clip.webm", "libvpx"))


@pytest.mark.parametrize("fields", [range(20, 40), range(12, 14), range(40), range(0)])
@pytest.mark.parametrize("suffix", [".ts", ".mkv"])
def test_frames_of_two_fields(tmp_path, fields, suffix):
    """Broadcasts code some frames as two fields, each a packet of its own."""
    path = fields_h264.write(tmp_path / f"clip{suffix}", 40, fields)
    assert len(decode_all(path)) == 40
    for count in (1, 2, 6, 40):
        right = np.linspace(0, 39, count, dtype=int).tolist()
        sampled = list(sample(path, count))
        assert [number_in(rgb[:48]) for _, rgb in sampled] == right
        np.testing.assert_allclose([s for s, _ in sampled], np.array(right) / 25, atol=1e-3)


def test_marks_of_frames_left_out_are_no_frames(tmp_path):
    """MPEG-4 marks a frame that was left out as not coded; no packet near it need be decoded."""
    whole = write(tmp_path / "whole.mp4", "mpeg4", {"g": "12"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "clip.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(p for p in source.demux(video=0) if p.size):
            if i in (20, 21):
                mark = av.Packet(b"\0\0\1\xb6\x50\x40")  # a P-VOP, time 0, vop_coded 0
                mark.time_base, mark.pts, mark.dts = packet.time_base, packet.pts, packet.dts
                packet = mark
            packet.stream = stream
            target.mux(packet)
    frames = assert_as_decoded(tmp_path / "clip.mp4", (1, 2, 3))
    assert len(frames) == 58


def test_colors_are_those_of_the_file(tmp_path):
    """A BT.709 card whose planes are computed here, so that no library's matrix enters."""
    card, (kr, kb) = np.array([[200, 60, 20], [20, 160, 60]]), (0.2126, 0.0722)
    luma = card @ [kr, 1 - kr - kb, kb]
    blue, red = (card[:, 2] - luma) / (2 - 2 * kb), (card[:, 0] - luma) / (2 - 2 * kr)
    planes = [16 + 219 / 255 * luma, 128 + 224 / 255 * blue, 128 + 224 / 255 * red]
    frame = av.VideoFrame.from_ndarray(
        np.stack([np.repeat(np.rint(plane).astype(np.uint8), 32)[None].repeat(48, 0) for plane in planes]), "yuv444p"
    )
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        options = {"qp": "0", "x264-params": "colormatrix=bt709"}
        stream = container.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    ((_, rgb),) = sample(tmp_path / "clip.mp4", 1)
    np.testing.assert_allclose(rgb[24, [8, 56]], card, atol=2)


def test_colors_of_two_swapped_bytes(tmp_path):
    with av.open(str(tmp_path / "clip.mov"), "w") as container:
        stream = container.add_stream("rawvideo", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb565be"
        color = (25 << 11 | 15 << 5 | 2).to_bytes(2, "big")
        frame = av.VideoFrame(64, 48, "rgb565be")
        frame.planes[0].update(color * (frame.planes[0].buffer_size // 2))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    ((_, rgb),) = sample(tmp_path / "clip.mov", 1)
    np.testing.assert_allclose(rgb[24, 8], [25 * 255 / 31, 15 * 255 / 63, 2 * 255 / 31], atol=8)


def test_a_small_file_of_huge_frames_is_rejected(tmp_path):
    frame = b"\x21\xf9\4\0\x0a\0\0\0\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\2\2\x44\1\0"
    canvas = struct.pack("<HH", 15000, 15000) + b"\x80\0\0\0\0\0\xff\xff\xff"
    (tmp_path / "clip.gif").write_bytes(b"GIF89a" + canvas + 4 * frame + b"\x3b")
    rejected(tmp_path / "clip.gif", 2, "clip.gif", "15000×15000")


def _threads():
    """Threads of the process, those of libraries included."""
    return len(list(Path("/proc/self/task").iterdir()))


def assert_threads_end(most):
    """No more than so many threads stay; one that was joined is still listed for a moment."""
    end = time.monotonic() + 60
    while _threads() > most and time.monotonic() < end:
        time.sleep(0.01)
    assert _threads() <= most


def test_nothing_of_a_video_outlives_its_frames(tmp_path):
    """Neither decoders, whose threads would add up, nor decoded frames wait for Python to collect cycles."""
    path = write(tmp_path / "clip.mp4")
    list(sample(path, 4))
    gc.collect()
    gc.disable()
    try:
        threads = _threads()
        for _ in range(4):
            list(sample(path, 4))
            next(sample(path, 4))
        assert_threads_end(threads)
        assert not [thing for thing in gc.get_objects() if type(thing) is av.VideoFrame]
    finally:
        gc.enable()


def test_damage_in_a_frame_that_is_shown_after_the_wanted_ones_is_found(tmp_path):
    """The wanted frame depends on it, and FFmpeg does not say so; what it made up may spoil frames of the next run."""
    path = write(tmp_path / "clip.mp4", options=H264 | {"x264-params": "b-adapt=0:b-pyramid=none"})
    before = read_timeline(path)
    place, keys = before.packets[4], {key.place for key in before.keys}
    assert place < before.packets[1] < before.packets[5]
    half = rewrite(
        path,
        tmp_path / "half.mp4",
        lambda i, c: (c[: len(c) // 2] + bytes(len(c) - len(c) // 2) if i == place else c, i in keys),
    )
    with pytest.raises(DisagreementError, match=r"the frame at 0\.167 s is damaged"):
        list(decoding.decode_frames(half, read_timeline(half), [1], decoding.Decoders(), lambda frame: frame))


def decoded_packets(path, count, monkeypatch):
    """Frames, and how many packets the decoders got for them."""
    packets, decode = [], decoding.decode

    def counted(stream, given):
        return decode(stream, (packets.append(packet.pts) or packet for packet in given))

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "decode", counted)
        return list(sample(path, count)), len(packets)


@pytest.mark.parametrize("kind", ["h264", "h264 in matroska", "h264 in a transport stream", "h264 open gop"])
def test_pictures_that_no_other_refers_to_are_left_out(tmp_path, monkeypatch, kind):
    suffix, encoder, options = KINDS[kind]
    path = write(tmp_path / f"clip{suffix}", encoder, options, times=range(120))
    sparse, few = decoded_packets(path, 4, monkeypatch)
    monkeypatch.setattr(decoding, "is_disposable", lambda packet, extradata: False)
    whole, all_of_them = decoded_packets(path, 4, monkeypatch)
    assert few < all_of_them
    for (_, one), (_, other) in zip(sparse, whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_decodes_only_with_all_pictures_is_decoded_with_them(tmp_path, monkeypatch, caplog):
    without = decoding._without_disposable

    def lose_one(packets, stream, timeline, wanted, left_out):
        for place, packet in enumerate(without(packets, stream, timeline, wanted, left_out)):
            if place != 1:
                yield packet

    monkeypatch.setattr(decoding, "_without_disposable", lose_one)
    assert_as_decoded(write(tmp_path / "clip.mp4"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("heads", "right"),
    [
        ([0x01], True),
        ([0x09, 0x06, 0x01, 0x01, 0x0C], True),
        ([0x01, 0x41], False),  # a slice of a picture that others refer to
        ([0x67, 0x01], False),  # parameters, which later pictures may need
        ([0x65], False),
        ([0x06, 0x09], False),  # no picture
        ([0x02], False),  # a part of a slice
        ([], False),
    ],
)
def test_a_picture_that_no_other_refers_to(heads, right):
    units = [bytes([head, 1, 2, 3]) for head in heads]
    assert is_disposable(b"".join(b"\0\0\1" + unit for unit in units), None) == right
    for size in (1, 2, 4):
        avcc, packet = bytes([1, 100, 0, 30, 252 | size - 1]), [len(u).to_bytes(size, "big") + u for u in units]
        assert is_disposable(b"".join(packet), avcc) == right
        assert not is_disposable(b"".join(packet)[:-1], avcc)  # malformed
