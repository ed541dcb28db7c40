"""examples/camera.py answers about a file that stands in for the camera."""

from pathlib import Path

import av
import numpy as np
import pytest

from examples import camera
from examples.make_video import write
from tango_runtime import VideoLLM
from tango_runtime.video import sample


def shift(source: Path, target: Path, seconds: int) -> Path:
    """Copies a video so that its times begin later."""
    with av.open(str(source)) as clip, av.open(str(target), "w") as moved:
        stream = moved.add_stream_from_template(clip.streams.video[0])
        for packet in clip.demux(video=0):
            if packet.size:
                ticks = int(seconds / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, stream
                moved.mux(packet)
    return target


def test_it_answers_about_what_it_saw_last(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "clip.mp4")
    clip = shift(tmp_path / "clip.mp4", tmp_path / "clip.mkv", 600)  # a recording's clock need not begin at 0
    asked = []

    class Watched(VideoLLM):
        def stream(self, window, question, **options):
            asked.append((window, question))
            return super().stream(window, question, **options, max_new_tokens=6)

    monkeypatch.setattr(camera, "VideoLLM", Watched)
    arguments = [str(tiny_bundle), "What moves?", "--source", str(clip)]
    camera.main([*arguments, "--frames", "4", "--fps", "8", "--answers", "2", "--every", "0.1"])

    expected, llm = "", VideoLLM(tiny_bundle)
    for window, question in asked:
        answer = llm.generate(window, question, frames=4, max_new_tokens=6)
        expected += f"[{window[-1][0] - window[0][0]:.1f} s] {answer.text} ({answer.kept} of {4 * 16} tokens)\n"
        assert answer.text.strip()
        assert 0 < answer.kept < answer.total == 64
    assert len(asked) == 2
    assert capsys.readouterr().out == expected
    (first, _), (second, _) = asked
    assert second[-1][0] >= first[-1][0] > first[0][0]


def test_the_buffer_holds_the_last_seconds_at_its_rate() -> None:
    def seen_by_camera():
        buffer = np.empty((2, 2, 3), np.uint8)
        for i in range(100):
            buffer[...] = i
            yield 50 + i / 8, buffer

    last = camera.LastSeconds(seen_by_camera(), seconds=3, fps=4)
    last.reader.join()
    window = last.window()
    assert [(seconds, int(frame[0, 0, 0])) for seconds, frame in window] == [(50 + i / 8, i) for i in range(74, 100, 2)]
    assert [(seconds, int(frame[0, 0, 0])) for seconds, frame in sample(window, 3)] == [(0, 74), (1.5, 86), (3, 98)]


def test_what_stops_the_camera_is_raised() -> None:
    def unplugged():
        yield 0.0, np.zeros((2, 2, 3), np.uint8)
        raise OSError("no such device")

    last = camera.LastSeconds(unplugged(), seconds=3, fps=2)
    last.reader.join()
    with pytest.raises(OSError, match="no such device"):
        last.window()
