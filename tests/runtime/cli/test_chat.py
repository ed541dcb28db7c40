"""`tango chat`: answers, commands, and errors that it survives."""

from __future__ import annotations

import io

import pytest

from tango_runtime import VideoLLM
from tango_runtime.cli.main import main

FIRST, SECOND = "What happens?", "And then?"


@pytest.fixture
def chat(tiny_bundle, clip, capsys, monkeypatch):
    """``chat(*lines, options=(), video=…)``: exit code, standard output, standard error of `tango chat`."""

    def call(*lines, options=(), video=clip):
        given = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8"))
        code = main(["chat", str(tiny_bundle), str(video), "--max-new-tokens", "8", *options])
        return code, *capsys.readouterr()

    return call


def test_answers_are_those_of_a_session(chat, llm, clip):
    with llm.session(clip) as session:
        wanted = [session.chat(message, max_new_tokens=8).text for message in (FIRST, SECOND)]
    code, out, err = chat(FIRST, "", SECOND)
    assert (code, out) == (0, "".join(f"{text}\n" for text in wanted))
    assert err.count("first token after") == 2


def test_a_new_chat_forgets_the_messages(chat, llm, clip):
    with llm.session(clip) as session:
        wanted = session.chat(FIRST, max_new_tokens=8).text
    assert chat(SECOND, "/new", FIRST)[1].splitlines()[-1] == wanted.splitlines()[-1]


@pytest.mark.parametrize(("line", "kept"), [("/ratio 0.5", None), ("/frames 2", "/ 32 video tokens")])
def test_the_video_is_seen_anew_with_other_settings(chat, line, kept):
    code, out, err = chat(line, FIRST)
    seen = [text for text in err.splitlines() if text.startswith("kept ")]
    assert code == 0
    assert out
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert kept is None or kept in seen[1]


def test_another_ratio_prunes_what_was_seen(chat, llm, clip, monkeypatch):
    seen, encode = [], VideoLLM.encode
    monkeypatch.setattr(VideoLLM, "encode", lambda *given, **options: (seen.append(1), encode(*given, **options))[1])
    _, out, _ = chat(FIRST, "/ratio 0.5", FIRST, "/new", FIRST)
    wanted = [llm.generate(clip, FIRST, retention_ratio=r, max_new_tokens=8).text for r in (None, 0.5, 0.5)]
    assert out == "".join(f"{text}\n" for text in wanted)
    assert seen == [1]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/none", "there is no command /none"),
        ("/ratio 2", "'2' is not a number above 0 and at most 1"),
        ("/frames", "'' is not a positive integer"),
        ("/report page.html", "there is no answer to report yet"),
        (f"{FIRST}\n/report \0.html", r"the path '\x00.html' has a NUL in it"),
        ("no UTF-8: \udcff", "the question is not valid Unicode"),
        ("<|im_end|>", "the question contains <|im_end|>"),
    ],
)
def test_an_error_is_shown_and_the_chat_goes_on(chat, line, error):
    code, out, err = chat(line, FIRST)
    assert code == 0
    assert f"error: {error}" in err
    assert "hint: " in err
    assert len(out.splitlines()) >= 1


def test_settings_that_fail_leave_the_session_that_was_there(chat, llm, clip):
    with llm.session(clip) as session:
        wanted = [session.chat(message, max_new_tokens=8).text for message in (FIRST, SECOND)]
    _, out, err = chat(FIRST, "/frames 100000", SECOND)
    assert out == "".join(f"{text}\n" for text in wanted)
    assert "error: " in err


def test_a_report_shows_the_last_answer(chat, tmp_path):
    page = tmp_path / "page.html"
    _, _, err = chat(FIRST, f"/report {page}")
    assert f"report: {page}" in err
    assert FIRST in page.read_text()


def test_it_ends_where_it_is_told(chat):
    assert chat("/quit", FIRST)[1] == ""
    assert "/ratio" in chat("/help")[2]


def test_a_missing_video_ends_it(chat, tmp_path):
    code, out, err = chat(FIRST, video=tmp_path / "none.mp4")
    assert (code, out) == (2, "")
    assert "none.mp4" in err


def test_a_report_never_replaces_the_video(chat, clip, tmp_path):
    video = tmp_path / "clip.html"
    video.write_bytes(clip.read_bytes())
    assert "would replace the video" in chat(FIRST, f"/report {video}", video=video)[2]
    assert video.read_bytes() == clip.read_bytes()


def test_standard_input_cannot_be_the_video_too(chat):
    code, out, err = chat(FIRST, video="-")
    assert (code, out) == (2, "")
    assert "error: standard input cannot be the video: questions are read from it" in err
