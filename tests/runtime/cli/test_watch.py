"""`tango watch`: answers as they come, lines of JSON, and alerts."""

from __future__ import annotations

import json
import sys

import pytest

from tango_runtime.cli.main import main

QUESTION = "What happens?"


@pytest.fixture
def watch(tiny_bundle, clip, capsys):
    """``watch(*options)``: exit code, standard output, standard error of `tango watch` of a clip of 8 seconds."""

    def call(*options, source=clip):
        code = main(
            ["watch", str(tiny_bundle), str(source), QUESTION, "--every", "2", "--max-new-tokens", "4", *options]
        )
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def answers(llm, clip):
    return list(llm.watch(clip, QUESTION, step=2.0, max_new_tokens=4))


def test_answers_come_with_their_time_and_what_was_kept(watch, answers):
    code, out, _ = watch()
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == len(answers) == 4
    for line, answer in zip(lines, answers, strict=True):
        assert line.startswith(f"[{answer.live.begin:.1f}-{answer.live.end:.1f} s] ")
        assert f"(kept {answer.kept}/{answer.total}, first token " in line


def test_lines_of_json(watch, answers):
    lines = [json.loads(line) for line in watch("--jsonl")[1].splitlines()]
    assert [line["answer"] for line in lines] == [answer.text for answer in answers]
    assert [line["end"] for line in lines] == [answer.live.end for answer in answers]
    assert {line["lag_seconds"] for line in lines} == {None}
    assert list(lines[0]["stages_ms"]) == ["prune", "prefill", "decode"]


def test_it_stops_after_so_many_answers(watch, answers):
    lines = [json.loads(line) for line in watch("--jsonl", "--count", "2")[1].splitlines()]
    assert [line["answer"] for line in lines] == [answer.text for answer in answers[:2]]


@pytest.fixture
def says(monkeypatch):
    """``says(*texts)``: what the model answers."""

    def told(*texts):
        from tango_runtime.cli import watch
        from tango_runtime.pipeline.answer import Answer, LiveMoment

        moment = LiveMoment(0.0, 1.0, 4, 0.25, 3, 0)
        given = [Answer(QUESTION, 0.1, text=text, total=10, live=moment) for text in texts]
        monkeypatch.setattr(watch, "_answers", lambda llm, args: iter(given))

    return told


@pytest.mark.parametrize(
    ("texts", "code", "shown"),
    [(["no", "Yes, a man.", "no"], 1, 2), (["no", "yesterday", "eyes"], 0, 3), (["YES"], 1, 1)],
)
def test_an_alert_ends_it_with_1(watch, says, texts, code, shown):
    says(*texts)
    found, out, _ = watch("--alert", "yes")
    assert (found, len(out.splitlines())) == (code, shown)
    assert ("ALERT " in out) == bool(code)
    assert "lag 0.25 s, 3 frames dropped" in out


def test_a_command_gets_each_alert_and_the_watch_goes_on(watch, says, tmp_path):
    says("yes", "no", "yes!")
    file = tmp_path / "alerts"
    script = f"import sys; open({str(file)!r}, 'a').write(sys.stdin.read())"
    code, out, _ = watch("--alert", "yes", "--alert-command", f'{sys.executable} -c "{script}"')
    assert (code, len(out.splitlines())) == (0, 3)
    assert [json.loads(line)["answer"] for line in file.read_text().splitlines()] == ["yes", "yes!"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--alert-command", "true"], "--alert-command was given without --alert"),
        (["--window", "0"], "'0' is not a positive integer"),
        (["--alert", "yes", "--alert-command", "/none/such"], "cannot be run"),
        (["--alert", "yes", "--alert-command", "'"], "cannot be run"),
        (["--alert", "yes", "--alert-command", " "], "cannot be run"),
        (["--alert", ""], "'' is no text"),
    ],
)
def test_what_cannot_work_is_named(watch, says, options, error):
    says("yes")
    code, out, err = watch(*options)
    assert (code, out) == (2, "")  # before the first answer
    assert error in err
    assert "hint: " in err


def test_a_command_that_fails_is_reported(watch, says):
    says("yes", "yes")
    code, out, err = watch("--alert", "yes", "--alert-command", f'{sys.executable} -c "raise SystemExit(3)"')
    assert (code, len(out.splitlines())) == (0, 2)
    assert "ended with 3" in err


def test_a_missing_source_is_named(watch, tmp_path):
    code, _, err = watch(source=tmp_path / "none.mp4")
    assert code == 2
    assert "none.mp4 does not exist" in err
