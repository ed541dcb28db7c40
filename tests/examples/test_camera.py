"""examples/03-camera/camera.py answers about a file that stands in for the camera."""

from pathlib import Path

import av
import pytest

from examples import camera
from examples.make_video import write
from tango_runtime import LiveVideo, VideoLLM
from tango_runtime.pipeline import video_llm


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
    answers = []

    class Watched(LiveVideo):
        def watch(self, question, **options):
            for answer in super().watch(question, **options, max_new_tokens=6):
                answers.append(answer)
                yield answer

    monkeypatch.setattr(video_llm, "LiveVideo", Watched)
    arguments = [str(tiny_bundle), "What moves?", "--source", str(clip)]
    camera.main([*arguments, "--frames", "4", "--seconds", "0.5", "--answers", "2", "--every", "0.5"])

    expected, llm = "", VideoLLM(tiny_bundle)
    for answer in answers:
        window = list(zip(answer.seconds.tolist(), answer.frames, strict=True))
        alone = llm.generate(window, "What moves?", frames=len(window), max_new_tokens=6)
        span = answer.live.end - answer.live.begin
        expected += f"[{span:.1f} s] {alone.text} ({alone.kept} of {16 * len(window)} tokens)\n"
        assert alone.text.strip()
        assert 1 <= len(window) <= 4  # a loaded machine may lose some
    assert len(answers) == 2
    assert capsys.readouterr().out == expected
    assert answers[1].live.end > answers[0].live.end
