"""`tango run`: its output, and its errors on bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tango_runtime.cli.main import main
from tango_runtime.video import sample
from tests.runtime.video.clips import write

QUESTION = "What happens?"


@pytest.fixture
def run(tiny_bundle, clip, capsys):
    """``run(*options, bundle=…, video=…, question=…)``: exit code, standard output, standard error of `tango run`."""

    def call(*options, bundle=tiny_bundle, video=clip, question=QUESTION):
        code = main(["run", str(bundle), str(video), question, *map(str, options)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def rejected(run):
    """``rejected(*options, …)`` of a command that fails: the texts after ``error:`` and ``hint:``."""

    def call(*options, **given):
        code, out, err = run(*options, **given)
        *_, error, hint = err.splitlines()
        assert code == 2
        assert out == ""
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        return error[7:], hint[6:]

    return call


# Sources.


@pytest.fixture
def on_stdin():
    """Puts a file on standard input."""
    before = os.dup(0)

    def put(path):
        with path.open("rb") as file:
            os.dup2(file.fileno(), 0)

    yield put
    os.dup2(before, 0)
    os.close(before)


def test_a_stream_on_standard_input(run, llm, on_stdin, tmp_path):
    stream, page = write(tmp_path / "clip.ts"), tmp_path / "kept.html"
    on_stdin(stream)
    code, out, err = run("--frames", 3, "--fps", 4, "--max-new-tokens", 8, "--report", page, video="-")
    frames = list(sample(stream, 60))[:18:6]
    assert (code, out) == (0, llm.generate(frames, QUESTION, frames=3, max_new_tokens=8).text + "\n")
    assert "taking 3 frames of standard input, 4 a second" in err
    assert "standard input" in page.read_text()


def test_a_stream_that_is_shorter_than_asked_for(rejected, on_stdin, tmp_path):
    on_stdin(write(tmp_path / "clip.ts"))
    error, hint = rejected("--frames", 3000, "--fps", 4, video="-")
    assert (error, hint) == ("standard input has 10 frames, 3000 were asked for", "ask for at most 10")


def test_keyframes(run, llm, tmp_path):
    path, page = write(tmp_path / "clip.mp4"), tmp_path / "kept.html"  # a keyframe every 12 of 60 frames, 24 a second
    code, out, err = run("--sampling", "keyframes", "--frames", 3, "--max-new-tokens", 8, "--report", page, video=path)
    frames = [timed for i, timed in enumerate(sample(path, 60)) if i in (0, 24, 48)]  # near 0, 29 and 59
    assert (code, out) == (0, llm.generate(frames, QUESTION, frames=3, max_new_tokens=8).text + "\n")
    said = f"keyframes, {16 / 24 / 3:.2f} s on average and {11 / 24:.2f} s at most from evenly spaced frames"
    assert f"sampled {said}" in err
    assert said in page.read_text()


def test_a_folder_has_no_keyframes(rejected, colors, tmp_path):
    Image.fromarray(colors[0]).save(tmp_path / "0.png")
    assert rejected("--sampling", "keyframes", video=tmp_path)[0] == "only video files have keyframes"


# Output.


def test_only_the_answer_is_on_standard_output(run, llm, clip):
    code, out, err = run("--max-new-tokens", 16)
    answer = llm.generate(clip, QUESTION, max_new_tokens=16)
    assert (code, out) == (0, answer.text + "\n")
    assert f"kept {answer.kept} / 64 video tokens" in err
    assert "answer 16 tokens (finish reason: length)" in err
    assert "backend: ONNX Runtime" in err
    stages = [line.split()[0] for line in err.splitlines() if line.endswith(" ms")]
    assert stages == ["video", "vision", "prune", "prefill", "decode"]
    assert re.search(r"first token after [\d.]+ ms, then [\d.]+ tokens/s$", err, re.MULTILINE)


def test_an_answer_of_one_token_has_no_rate(run):
    assert re.search(r"first token after [\d.]+ ms$", run("--max-new-tokens", 1)[2], re.MULTILINE)


def test_quiet_shows_only_the_answer(run, llm, clip):
    answer = llm.generate(clip, QUESTION, max_new_tokens=16)
    assert run("--max-new-tokens", 16, "--quiet") == (0, answer.text + "\n", "")


def test_options_reach_the_pipeline(run, llm, clip):
    options = {"frames": 6, "retention_ratio": 0.5, "max_new_tokens": 8, "temperature": 2.0, "top_p": 0.9, "seed": 5}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    _, out, err = run(*flags)
    answer = llm.generate(clip, QUESTION, **options)
    assert out == answer.text + "\n"
    assert f"kept {answer.kept} / 96 video tokens" in err


def test_unpruned(run, llm, clip):
    _, out, err = run("--no-prune", "--max-new-tokens", 8)
    assert out == llm.generate(clip, QUESTION, prune=False, max_new_tokens=8).text + "\n"
    assert "kept 64 / 64 video tokens (100.0%)" in err


def test_a_folder_of_images_and_its_frame_rate(run, llm, colors, tmp_path):
    for i, frame in enumerate(colors):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    _, out, _ = run("--fps", 2, "--max-new-tokens", 8, video=tmp_path)
    assert out == llm.generate(colors, QUESTION, fps=2, max_new_tokens=8).text + "\n"


def test_report_and_picture(run, tmp_path):
    page, sheet = tmp_path / "out.html", tmp_path / "out.png"
    code, _, err = run("--max-new-tokens", 4, "--report", page, "--picture", sheet)
    assert code == 0
    assert QUESTION in page.read_text()
    assert np.asarray(Image.open(sheet)).std() > 1
    assert str(page) in err
    assert str(sheet) in err
    assert sorted(tmp_path.iterdir()) == [page, sheet]


# Invalid input.


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--frames", 97], "clip.mp4 has 96 frames, 97 were asked for"),
        (["--frames", 0], "argument --frames: '0' is not a positive integer"),
        (["--frames", "many"], "argument --frames: 'many' is not a positive integer"),
        (["--retention-ratio", 1.5], "argument --retention-ratio: '1.5' is not a number above 0 and at most 1"),
        (["--retention-ratio", 0], "argument --retention-ratio: '0' is not a number above 0 and at most 1"),
        (["--retention-ratio", "nan"], "argument --retention-ratio: 'nan' is not a number above 0 and at most 1"),
        (["--no-prune", "--retention-ratio", 0.1], "argument --retention-ratio: not allowed with argument --no-prune"),
        (["--max-new-tokens", 0], "argument --max-new-tokens: '0' is not a positive integer"),
        (["--temperature", -1], "argument --temperature: '-1' is not a number of at least 0"),
        (["--temperature", "nan"], "argument --temperature: 'nan' is not a number of at least 0"),
        (["--top-p", 0], "argument --top-p: '0' is not a number above 0 and at most 1"),
        (["--fps", "inf"], "argument --fps: 'inf' is not a number above 0"),
        (["--retention-ratio", 0.12345], "retention_ratio is 0.12345"),
        (["--report", "/proc/x.html"], "/proc/x.html cannot be written"),
        (["--seed", -1], "argument --seed: '-1' is not a non-negative integer"),
        (["--fps", 2], "fps=2 was given for a source that has times of its own"),
        (["--backend", "abacus"], "argument --backend: invalid choice: 'abacus'"),
        (["--ratio", 0.1], "unrecognized arguments: --ratio 0.1"),
    ],
)
def test_a_bad_option_is_named(rejected, options, error):
    assert error in rejected(*options)[0]


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ("why? " * 2000, "the bundle's context is 2048"),
        ("what is <video>", "the question contains <video>"),
        ("what is <|im_end|>", "the question contains <|im_end|>"),
        ("what is \udcff", "the question"),
        (" \n", "the question is empty"),
    ],
)
def test_a_bad_question_is_named(rejected, question, error):
    assert error in rejected(question=question)[0]


def test_an_unpruned_video_that_exceeds_the_context_is_an_error_with_figures(run, rejected):
    assert run("--no-prune", "--frames", 96, "--max-new-tokens", 1)[0] == 0
    error, hint = rejected("--no-prune", "--frames", 96, question="why? " * 200)
    assert "1536 of them video; the bundle's context is 2048" in error
    assert hint == "keep fewer tokens (retention ratio, frames), ask less, or export with a larger --context"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("none.mp4", None, "does not exist"),
        ("notes.mp4", lambda whole: b"no video at all\n" * 99, "cannot be read as a video"),
        ("empty.mp4", lambda whole: b"", "is empty"),
        ("cut.mp4", lambda whole: whole[: len(whole) // 2], "is truncated"),
        ("one.mp4", lambda whole: whole[:100], "one.mp4"),
    ],
)
def test_a_bad_video_is_named(rejected, clip, tmp_path, name, content, error):
    if content:
        (tmp_path / name).write_bytes(content(clip.read_bytes()))
    found, _ = rejected(video=tmp_path / name)
    assert str(tmp_path / name) in found
    assert error in found


def test_a_folder_without_images_is_named(rejected, tmp_path):
    assert f"{tmp_path} holds no images" in rejected(video=tmp_path)[0]


@pytest.mark.parametrize(("option", "suffix"), [("--report", ".html"), ("--picture", ".png")])
def test_no_file_of_another_kind_is_replaced(run, tmp_path, option, suffix):
    file = tmp_path / "bundle.json"
    file.write_text("{}")
    code, _, err = run(option, file)
    assert (code, file.read_text()) == (2, "{}")
    assert f"bundle.json does not end in {suffix}" in err


@pytest.mark.parametrize("option", ["--report", "--picture"])
def test_a_missing_folder_for_the_report_is_named_before_the_work(rejected, tmp_path, option):
    assert f"there is no folder {tmp_path / 'none'}" in rejected(option, tmp_path / "none" / "out")[0]


@pytest.mark.parametrize("option", ["--report", "--picture"])
def test_a_report_file_that_is_a_folder_is_named(run, tmp_path, option):
    code, _, err = run("--max-new-tokens", 1, option, tmp_path)
    assert code == 2
    assert str(tmp_path) in err.splitlines()[-2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "name"), [("--report", "pipe.html"), ("--picture", "pipe.png")])
def test_a_pipe_is_refused_before_the_work(rejected, tmp_path, option, name):
    os.mkfifo(tmp_path / name)
    assert f"{name} is a named pipe" in rejected(option, tmp_path / name)[0]


def test_one_file_for_two_outputs_is_refused_before_the_work(rejected, tmp_path):
    for name in ("a.html", "a.png"):
        (tmp_path / name).symlink_to("both")
    error, _ = rejected("--report", tmp_path / "a.html", "--picture", tmp_path / "a.png")
    assert "would replace --" in error


@pytest.mark.parametrize("option", ["--report", "--picture"])
def test_an_output_that_is_the_video_is_refused(rejected, clip, tmp_path, option):
    video = tmp_path / ("clip.html" if option == "--report" else "clip.png")
    shutil.copy(clip, video)
    assert "would replace the video" in rejected(option, video, video=video)[0]
    assert video.read_bytes() == clip.read_bytes()


def test_a_picture_that_is_a_frame_is_refused(rejected, colors, tmp_path):
    for i, frame in enumerate(colors):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    assert "would replace the video" in rejected("--picture", tmp_path / "0.png", video=tmp_path)[0]


def test_names_that_are_not_utf8(run, clip, tmp_path):
    video, page = (tmp_path / os.fsdecode(name) for name in (b"clip\xff.mp4", b"page\xff.html"))
    shutil.copy(clip, video)
    assert run("--max-new-tokens", 2, "--report", page, video=video)[0] == 0
    assert "clip?.mp4" in page.read_text()


def test_a_report_is_written_even_if_the_answer_cannot_be_printed(tiny_bundle, clip, tmp_path):
    options = ["--max-new-tokens", "4", "--report", tmp_path / "out.html"]
    command = [sys.executable, "-m", "tango_runtime.cli.main", "run", tiny_bundle, clip, QUESTION, *options]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-2]
    assert QUESTION in (tmp_path / "out.html").read_text()


# Damaged bundles.


@pytest.fixture
def copied(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}<video>", "rendered within"),
        ("{{ 'x' * 10 ** 10 }}<video>", "more memory"),
        ("{% include '/etc/passwd' %}<video>", "cannot be rendered"),
    ],
)
def test_a_strangers_chat_template_is_refused(rejected, copied, monkeypatch, template, error):
    monkeypatch.setattr("tango_runtime.pipeline.chat_template._PROCESSOR_S", 1)
    (copied / "chat_template.jinja").write_text(template)
    files = json.loads((copied / "bundle.json").read_text())
    files["files"]["chat_template.jinja"]["size"] = len(template)
    (copied / "bundle.json").write_text(json.dumps(files))
    found, _ = rejected(bundle=copied)
    assert f"{copied}: the chat template" in found
    assert error in found


def test_a_missing_bundle_is_named(rejected, tmp_path):
    assert f"there is no bundle at {tmp_path / 'none'}" in rejected(bundle=tmp_path / "none")[0]
    assert f"{tmp_path} holds no bundle.json" in rejected(bundle=tmp_path)[0]


def without(*path):
    def edit(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    return edit


def setting(value, *path):
    def edit(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (setting("many", "decoder", "context"), "decoder: context"),
        (setting(2.5, "video", "frames"), "video: frames"),
        (setting(None, "prompt", "stop"), "prompt: stop"),
        (setting(7, "format"), "format 7"),
        (setting(1, "color"), "'color'"),
        (setting("int8", "dtype"), "dtype"),
        (setting("half", "prune", "retention_ratio"), "retention_ratio"),
        (setting(20000, "prune", "retention_ratio"), "retention_ratio"),
        (setting([5, 5], "prune", "grid"), "grid"),
        (setting("<image>", "prompt", "placeholder"), "<image>"),
        (without("decoder"), "'decoder'"),
        (without("graphs", "decoder"), "decoder"),
        (without("files", "chat_template.jinja"), "chat_template.jinja"),
        (setting("x", "graphs", "decoder", "inputs", 2, "name"), "decoder.onnx"),
        (setting(64, "graphs", "vision", "inputs", 0, "shape", 1), "graphs: vision"),
    ],
)
def test_an_invalid_bundle_json_is_named(rejected, copied, edit, error):
    manifest = json.loads((copied / "bundle.json").read_text())
    edit(manifest)
    (copied / "bundle.json").write_text(json.dumps(manifest))
    assert error in rejected(bundle=copied)[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_bundle_json_without_an_object_is_named(rejected, copied, text):
    (copied / "bundle.json").write_bytes(text.encode("latin-1"))
    assert str(copied / "bundle.json") in rejected(bundle=copied)[0]


@pytest.mark.parametrize("name", ["decoder.onnx.data", "vision.onnx", "tokenizer.json", "chat_template.jinja"])
def test_missing_and_truncated_files_are_named(rejected, copied, name):
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[:-1])
    assert f"{copied / name} has {len(whole) - 1} bytes" in rejected(bundle=copied)[0]
    (copied / name).unlink()
    assert f"{copied} has no {name}" in rejected(bundle=copied)[0]


@pytest.mark.parametrize("name", ["decoder.onnx", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_file_is_named_where_it_is_read(rejected, copied, name):
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(b"\xff" * len(whole))
    assert name in rejected(bundle=copied)[0].replace("chat template", "chat_template.jinja")


def test_a_changed_file_is_found_by_its_hash(copied, capsys):
    weights = bytearray((copied / "decoder.onnx.data").read_bytes())
    weights[100] ^= 1
    (copied / "decoder.onnx.data").write_bytes(weights)
    assert main(["inspect", str(copied)]) == 0
    assert main(["inspect", str(copied), "--verify"]) == 2
    assert f"error: {copied / 'decoder.onnx.data'} has changed" in capsys.readouterr().err


# In a separate process.


def test_a_missing_onnx_runtime_is_named(tiny_bundle, clip):
    blocked = "import sys; sys.modules['onnxruntime'] = None; from tango_runtime.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", blocked, "run", tiny_bundle, clip, QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no backend can run ")
    assert done.stderr.endswith("no ort-cpu: ONNX Runtime is not installed\nhint: pip install 'tango-edge[cpu]'\n")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_an_error_and_leaves_nothing_behind(tiny_bundle, clip, tmp_path, how):
    options = ["--frames", "96", "--max-new-tokens", "1500", "--report", tmp_path / "out.html"]
    command = [sys.executable, "-m", "tango_runtime.cli.main", "run", tiny_bundle, clip, QUESTION, *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while "vision" not in (line := process.stderr.readline()):  # wait until it is running, and not importing
            assert line
        process.send_signal(how)
        lines = process.stderr.read().splitlines()
    assert process.returncode == 2, lines
    assert lines[-2:] == ["error: interrupted", "hint: no half-written output was left behind; run it again"]
    assert list(tmp_path.iterdir()) == []


def test_a_closed_standard_output_ends_the_run_quietly(tiny_bundle, clip):
    command = [
        sys.executable,
        "-m",
        "tango_runtime.cli.main",
        "run",
        tiny_bundle,
        clip,
        QUESTION,
        "--max-new-tokens",
        "600",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert "Traceback" not in err
    assert "Exception ignored" not in err
