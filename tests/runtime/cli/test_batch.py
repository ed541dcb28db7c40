"""`tango batch`: its answers are those of `tango run`, and no end of it loses or repeats one."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import closing

import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.batch import decoding
from tango_runtime.batch.questions import read_questions
from tango_runtime.batch.worker import SamplingOptions, Settings, Task, Worker
from tango_runtime.cli.main import main
from tango_runtime.util.processes import Child

QUESTIONS = ["What happens?", "Who comes in?"]


@pytest.fixture
def folder(tmp_path, clip):
    """Videos, and questions.jsonl with two questions about each of them, in turns."""
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clip, tmp_path / name)
    ask(tmp_path, [{"video": name, "question": text} for text in QUESTIONS for name in ("a.mp4", "b.mp4")])
    return tmp_path


@pytest.fixture
def batch(tiny_bundle, folder, capsys):
    """``batch(*options, output=…)``: exit code and standard error of `tango batch` on the folder."""

    def call(*options, output=None, bundles=(tiny_bundle,)):
        code = main(command(folder, bundles, output, *options))
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return call


def command(folder, bundles, output=None, *options):
    named = [*bundles, folder / "questions.jsonl", "--output", output or folder / "answers.jsonl"]
    return ["batch", *map(str, named), "--max-new-tokens", "6", "--decoders", "0", *map(str, options)]


def ask(folder, rows):
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    (folder / "questions.jsonl").write_text(text)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# Answers.


@pytest.mark.parametrize("decoders", [0, 1])
def test_answers_are_those_of_one_run_each(batch, folder, llm, decoders):
    code, err = batch("--decoders", decoders, "--retention-ratio", 0.5, "--frames", 5)
    assert code == 0
    found = lines(folder / "answers.jsonl")
    assert len(found) == 4
    for line in found:
        options = {"retention_ratio": 0.5, "frames": 5, "max_new_tokens": 6}
        answer = llm.generate(folder / line["video"], line["question"], **options)
        assert (line["answer"], line["finish"], line["kept"], line["total"]) == (
            answer.text,
            answer.finish,
            answer.kept,
            answer.total,
        )
    assert {line["id"] for line in found} == {"a.mp4#0", "a.mp4#1", "b.mp4#0", "b.mp4#1"}
    assert "answers 100%" in err
    assert "model busy" in err
    assert not (folder / "answers.errors.jsonl").exists()


def test_the_next_video_is_encoded_before_the_last_answer_is_given(batch, folder, tiny_bundle, monkeypatch):
    """So it is under way while that is written. A fault of the next video is left for its turn."""
    events, encode = [], VideoLLM.encode
    batch(output=folder / "wanted.jsonl")

    def noted(llm, video):
        events.append("encode")
        if events.count("encode") == 1:
            raise TangoError("out of memory for now", "wait")
        return encode(llm, video)

    monkeypatch.setattr(VideoLLM, "encode", noted)
    settings = Settings((tiny_bundle,), (), sampling=SamplingOptions(max_new_tokens=6))
    (trial,) = settings.trials()
    videos, _ = read_questions(folder / "questions.jsonl")
    with closing(Worker(settings)) as worker:
        worker.load()
        tasks = [Task(video, ((trial, video.questions),)) for video in (*videos, videos[0])]
        for task in tasks:
            worker.add(task)
        for _ in tasks:
            for outcome in worker.answer_next():
                events.append((outcome.id, outcome.answer))
    wanted = [(line["id"], line["answer"]) for line in lines(folder / "wanted.jsonl")]
    assert events == [wanted[0], "encode", *wanted[1:3], "encode", wanted[3], *wanted[:2]]


def test_videos_are_decoded_before_the_model_is_loaded(folder, tiny_bundle, batch):
    """They are answered in their order."""
    batch(output=folder / "wanted.jsonl")
    settings = Settings((tiny_bundle,), (), sampling=SamplingOptions(max_new_tokens=6))
    (trial,) = settings.trials()
    videos, _ = read_questions(folder / "questions.jsonl")
    with closing(Worker(settings, decoders=2)) as worker:
        assert worker.early == worker.depth == 5
        for video in videos:
            worker.add(Task(video, ((trial, video.questions),)))
        for _, decoded in worker._waiting:
            assert len(decoded.result().batch) == 4
        worker.load()
        found = [(outcome.id, outcome.answer) for _ in videos for outcome in worker.answer_next()]
    assert found == [(line["id"], line["answer"]) for line in lines(folder / "wanted.jsonl")]


@pytest.mark.parametrize(("backend", "on_gpu", "error"), [("tensorrt", 0, "TensorRT"), ("ort-cpu", 1, "has no GPU")])
def test_a_model_that_cannot_be_loaded_leaves_no_process(batch, folder, monkeypatch, backend, on_gpu, error):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, err = batch("--backend", backend, "--decoders", 1, "--gpu-decoders", on_gpu)
    assert code == 2
    assert error in err
    assert not multiprocessing.active_children()
    assert not (folder / "answers.jsonl").exists()


def test_there_are_no_more_decoders_than_videos(batch, monkeypatch):
    """Each would take a few files and tens of megabytes of this machine."""
    started = []
    monkeypatch.setattr(decoding, "Child", lambda opened: started.append(opened) or Child(opened))
    assert batch("--decoders", 5)[0] == 0
    assert len(started) == 2


def test_a_gpu_that_decodes_needs_a_gpu(batch):
    code, err = batch("--backend", "ort-cpu", "--gpu-decoders", 1)
    assert code == 2
    assert "ort-cpu has no GPU that decodes videos" in err


def counted(monkeypatch, owner, name, seen):
    """Counts the calls of a function: what it is given by keyword, and by place as a last resort, goes to a list."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **more: (seen.append(more or given), function(*given, **more))[1])


def test_a_video_is_decoded_once_and_encoded_once_for_all_ratios_of_a_bundle(
    batch, folder, tiny_bundle, tmp_path, monkeypatch, llm
):
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    decoded, encoded, seen = [], [], []
    counted(monkeypatch, decoding, "decode", decoded)
    counted(monkeypatch, VideoLLM, "encode", encoded)
    counted(monkeypatch, VideoLLM, "session", seen)
    assert batch("--retention-ratio", 0.25, 0.5, bundles=(tiny_bundle, other))[0] == 0
    monkeypatch.undo()
    assert (len(decoded), len(encoded)) == (2, 4)
    assert [options["retention_ratio"] for options in seen] == [0.25, 0.5] * 4
    found = lines(folder / "answers.jsonl")
    assert len({(line["id"], line["bundle"], line["retention_ratio"]) for line in found}) == len(found) == 16
    for line in found:
        options = {"retention_ratio": line["retention_ratio"], "max_new_tokens": 6}
        assert line["answer"] == llm.generate(folder / line["video"], line["question"], **options).text


def test_several_bundles_answer_the_same_frames(batch, folder, tiny_bundle, tmp_path):
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    assert batch("--no-prune", bundles=(tiny_bundle, other))[0] == 0
    found = lines(folder / "answers.jsonl")
    answers = {(line["bundle"], line["id"]): line["answer"] for line in found}
    assert len(answers) == 8
    assert all(answers["other", key] == answers[tiny_bundle.name, key] for name, key in answers if name == "other")
    assert {line["retention_ratio"] for line in found} == {None}


def test_options_become_part_of_the_question(batch, folder, llm):
    ask(folder, [{"video": "a.mp4", "question": "Who?", "options": ["a dog", "a man"], "answer": "B", "id": 7}])
    assert batch()[0] == 0
    (line,) = lines(folder / "answers.jsonl")
    assert line["id"] == 7
    assert line["question"].splitlines()[:3] == ["Who?", "A. a dog", "B. a man"]
    assert line["answer"] == llm.generate(folder / "a.mp4", line["question"], max_new_tokens=6).text


def test_a_template_that_puts_the_question_first_is_answered(batch, folder, question_first_bundle):
    assert batch(bundles=(question_first_bundle,))[0] == 0
    alone = VideoLLM(question_first_bundle)
    for line in lines(folder / "answers.jsonl"):
        assert line["answer"] == alone.generate(folder / "a.mp4", line["question"], max_new_tokens=6).text


# Going on.


def test_what_is_there_is_not_answered_again(batch, folder, monkeypatch):
    assert batch()[0] == 0
    whole = (folder / "answers.jsonl").read_bytes()
    kept = whole.splitlines(keepends=True)
    (folder / "answers.jsonl").write_bytes(b"".join([kept[2], kept[0]]))
    added = []
    add = Worker.add
    monkeypatch.setattr(Worker, "add", lambda worker, task: (added.append(len(task)), add(worker, task))[1])
    code, err = batch()
    assert code == 0
    assert "2 answers to give, about 2 videos; 2 are there" in err
    assert added == [1, 1]
    assert sorted((folder / "answers.jsonl").read_bytes().splitlines(keepends=True)) == sorted(kept)
    monkeypatch.setattr(Worker, "__init__", None)  # nothing is loaded where nothing is to do
    assert batch()[0] == 0


def test_no_kill_loses_or_repeats_an_answer(batch, folder, tiny_bundle):
    """In a line, after one and before one; each run goes on with what the one before left."""
    undisturbed = folder / "undisturbed.jsonl"
    assert batch(output=undisturbed)[0] == 0
    for line, size in ((0, 40), (1, -1), (1, 0)):
        arguments = [
            sys.executable,
            "-m",
            "tests.fakes.killed_cli",
            str(line),
            str(size),
            *command(folder, [tiny_bundle]),
        ]
        assert subprocess.run(arguments, capture_output=True, check=False).returncode == -signal.SIGKILL
    code, err = batch()
    assert code == 0
    assert "1 answers to give" in err
    answers = (folder / "answers.jsonl").read_text().splitlines()
    assert sorted(answers) == sorted(undisturbed.read_text().splitlines())


def test_a_second_process_is_refused(batch, folder, tiny_bundle):
    waiting = [sys.executable, "-m", "tests.fakes.paused_cli", "backend: ", *command(folder, [tiny_bundle])]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert any(line.startswith("backend: ") for line in first.stderr), "the first process ended"
        code, err = batch()
        first.stdin.close()
        assert first.wait() == 0
    assert code == 2
    assert f"error: another process is writing {folder / 'answers.jsonl'}" in err
    assert len(lines(folder / "answers.jsonl")) == 4


def test_a_full_disk_leaves_whole_lines(batch, folder, tiny_bundle):
    assert batch(output=folder / "undisturbed.jsonl")[0] == 0
    undisturbed = (folder / "undisturbed.jsonl").read_text().splitlines()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(undisturbed[0]) + 20,) * 2)

    arguments = [sys.executable, "-m", "tango_runtime.cli.main", *command(folder, [tiny_bundle])]
    done = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 2
    assert f"error: {folder / 'answers.jsonl'} cannot be written: File too large" in done.stderr
    assert (folder / "answers.jsonl").read_text() == undisturbed[0] + "\n"
    assert batch()[0] == 0
    assert sorted((folder / "answers.jsonl").read_text().splitlines()) == sorted(undisturbed)


# What is wrong.


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--ray", "local"], "--ray needs Ray, which is not installed"),
        (["--backend", "tensorrt"], "tensorrt"),
    ],
)
def test_what_cannot_run_leaves_no_file(batch, folder, monkeypatch, options, error):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    before = sorted(folder.iterdir())
    code, err = batch(*options)
    assert code == 2
    assert error in err
    assert sorted(folder.iterdir()) == before


def test_each_wrong_line_fails_by_itself(batch, folder, clip):
    (folder / "cut.mp4").write_bytes(clip.read_bytes()[:5000])
    rows = [
        {"video": "cut.mp4", "question": "Who?"},
        {"video": "none.mp4", "question": "Who?", "id": "none"},
        {"video": "a.mp4", "question": "Who?", "id": "same"},
        {"video": "b.mp4", "question": "Where?", "id": "same"},
        {"video": "a.mp4", "question": "What is <|im_end|>?"},
        {"video": "a.mp4"},
        '{"video": "a.mp4"',
        "[1]",
        {"video": "a.mp4", "question": "Who?", "id": 1.5},
        {"video": "a.mp4", "question": "Who?", "options": "red"},
        {"video": "a.mp4", "question": "When?"},
        {"video": "a\0.mp4", "question": "Who?"},
        '{"video": "a.mp4", "question": "Who?", "video": "b.mp4"}',
    ]
    ask(folder, rows)
    code, err = batch("--decoders", 1)
    assert code == 1
    assert [line["question"] for line in lines(folder / "answers.jsonl")] == ["Who?", "When?"]
    errors = {line["line"]: line["error"] for line in lines(folder / "answers.errors.jsonl")}
    wanted = {
        1: "cut.mp4 is truncated",
        2: "none.mp4 does not exist",
        4: 'the id "same" is already used in line 3',
        5: "the question contains <|im_end|>",
        6: "question is null",
        7: "line 7 is not JSON",
        8: "line 8 is not an object",
        9: "id is 1.5",
        10: 'options is "red"',
        12: r'video is "a\u0000.mp4"',
        13: 'line 13 is not JSON: an object has the key "video" twice',
    }
    assert errors.keys() == wanted.keys()
    assert all(wanted[line] in errors[line] for line in wanted)
    assert f"errors: {folder / 'answers.errors.jsonl'} (11)" in err


def test_a_missing_video_counts_for_every_ratio(batch, folder):
    ask(folder, [{"video": name, "question": "Who?"} for name in ("a.mp4", "none.mp4")])
    code, err = batch("--retention-ratio", 0.25, 0.5)
    assert code == 1
    assert "answers 100%" in err
    assert len(lines(folder / "answers.errors.jsonl")) == 1


def test_a_line_that_is_mended_is_answered(batch, folder, clip):
    ask(folder, [{"video": "late.mp4", "question": text} for text in QUESTIONS])
    assert batch()[0] == 1
    shutil.copy(clip, folder / "late.mp4")
    assert batch()[0] == 0
    assert len(lines(folder / "answers.jsonl")) == 2
    assert not (folder / "answers.errors.jsonl").exists()


def test_answers_of_other_settings_are_not_mixed(batch, folder):
    assert batch()[0] == 0
    before = (folder / "answers.jsonl").read_bytes()
    for options in (("--max-new-tokens", 7), ("--retention-ratio", 0.5), ("--frames", 5)):
        code, err = batch(*options)
        assert code == 2
        assert "line 1 was answered with other settings" in err
    assert (folder / "answers.jsonl").read_bytes() == before


def test_another_ratio_may_be_added(batch, folder):
    assert batch("--retention-ratio", 0.25)[0] == 0
    assert "4 answers to give" in batch("--retention-ratio", 0.25, 0.5)[1]


def test_an_id_keeps_its_question(batch, folder):
    assert batch()[0] == 0
    ask(folder, [{"video": "a.mp4", "question": "Another?"}])
    code, err = batch()
    assert code == 2
    assert "answers another question of the id 'a.mp4#0'" in err


def test_an_id_keeps_its_video(batch, folder):
    ask(folder, [{"video": "./a.mp4", "question": "Who?", "id": 1}])
    assert batch()[0] == 0
    ask(folder, [{"video": "a.mp4", "question": "Who?", "id": 1}, {"video": "b.mp4", "question": "Who?", "id": 2}])
    code, err = batch()
    assert code == 0
    assert "1 answers to give" in err  # ./a.mp4 is a.mp4
    ask(folder, [{"video": "b.mp4", "question": "Who?", "id": 1}])
    code, err = batch()
    assert code == 2
    assert "line 1 answers a question about ./a.mp4 of the id 1" in err


def test_questions_may_come_and_go(batch, folder):
    ask(folder, [{"video": "a.mp4", "question": "Who?", "id": 1}])
    assert batch()[0] == 0
    ask(folder, [{"video": "b.mp4", "question": "Who?", "id": 2}])
    assert batch()[0] == 0
    assert [line["id"] for line in lines(folder / "answers.jsonl")] == [1, 2]


def test_answers_of_another_bundle_of_the_same_name_are_not_mixed(batch, folder, tiny_bundle, tmp_path):
    copy = shutil.copytree(tiny_bundle, tmp_path / "elsewhere" / tiny_bundle.name)
    assert batch()[0] == 0
    assert "0 answers to give" in batch(bundles=(copy,))[1]
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["prune"]["neighbors"] += 1
    (copy / "bundle.json").write_text(json.dumps(manifest))
    code, err = batch("--retention-ratio", 0.1, bundles=(copy,))
    assert code == 2
    assert "line 1 was answered with other settings" in err


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"id": 3}\n'])
def test_a_file_that_is_none_of_answers_is_left_alone(batch, folder, content):
    (folder / "answers.jsonl").write_bytes(content)
    code, err = batch()
    assert code == 2
    assert "hint: " in err
    assert (folder / "answers.jsonl").read_bytes() == content


@pytest.mark.parametrize("content", [b"my notes\n", b'{"id": 3, "video": "a.mp4"}\n'])
def test_a_file_that_is_none_of_errors_is_left_alone(batch, folder, content):
    (folder / "answers.errors.jsonl").write_bytes(content)
    code, err = batch()
    assert code == 2
    assert f"{folder / 'answers.errors.jsonl'} holds no errors of tango batch" in err
    assert (folder / "answers.errors.jsonl").read_bytes() == content
    assert not (folder / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("questions.jsonl", "would replace the questions"),
        (".", "would replace the questions"),
        ("/dev/null", "gone on with"),
    ],
)
def test_an_output_that_cannot_be_is_refused(batch, folder, output, error):
    before = (folder / "questions.jsonl").read_bytes()
    code, err = batch(output=folder / output)
    assert code == 2
    assert error in err
    assert (folder / "questions.jsonl").read_bytes() == before


def test_models_share_a_gpu_of_a_cluster_only(batch):
    code, err = batch("--models-per-gpu", 2)
    assert code == 2
    assert "--models-per-gpu is for workers of a Ray cluster" in err


@pytest.mark.parametrize(("text", "error"), [("", "has no questions"), (None, "there is no ")])
def test_a_batch_needs_questions(batch, folder, text, error):
    (folder / "questions.jsonl").unlink() if text is None else ask(folder, [])
    code, err = batch()
    assert code == 2
    assert error in err


def test_videos_may_be_elsewhere(batch, folder):
    (folder / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).rename(folder / "videos" / name)
    assert batch()[0] == 1
    assert batch("--video-folder", folder / "videos")[0] == 0
