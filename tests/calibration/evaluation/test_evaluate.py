"""`tango evaluate`: a reader that can be predicted, a small bundle, several processes, and what is written."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tango_calibration.data.dataset import Video, read_folder
from tango_calibration.data.questions import Question
from tango_calibration.evaluation import results
from tango_calibration.evaluation.evaluate import (
    ALL,
    NONE,
    BundleEvaluator,
    Trial,
    check_room,
    evaluate,
    evaluate_in_parallel,
    trials_of,
)
from tango_calibration.evaluation.methods import METHODS, OWN_COUNT
from tango_calibration.evaluation.scores import Estimate, Scores, combine
from tango_calibration.parallel import BLAS_THREADS, child_settings
from tango_plugins import PruneParams, TangoError, op, reference
from tango_runtime import VideoLLM
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tests.fakes.sequence import OneSequence

ROOT = Path(__file__).parents[3]
PARAMS = PruneParams(grid=(4, 4), sink_positions=())
TRIALS = trials_of(METHODS, (0.1, 0.3))
HOW_MANY = "How many tokens?"
BRIGHT = "Which frame is bright?"


class Counter:
    """Sees noise, and tells the number of tokens that it is given and the brightest frame that it saw."""

    size = (8, 8)

    def __init__(self):
        self.seen, self.prefilled = 0, []

    def __str__(self):
        return "a counter"

    def encode_video(self, frames):
        self.seen += 1
        self.bright = int(frames.mean(axis=(1, 2, 3)).argmax())
        rng = np.random.default_rng(self.bright)
        return rng.standard_normal((len(frames), 16, 12)).astype(np.float32), rng.random((len(frames), 16), np.float32)

    def answer(self, tokens, questions):
        self.prefilled.append(len(tokens))
        said = {HOW_MANY: f"{len(tokens)}.", BRIGHT: str(self.bright)}
        return [said[question] for question in questions], 5.0


def video(name, bright, frames=4):
    """Frames of which one is bright, and two questions."""
    pixels = np.zeros((frames, 8, 8, 3), np.uint8)
    pixels[bright] = 200
    questions = Question("count", HOW_MANY, "64"), Question("when", BRIGHT, str(bright), tags=("brief",))
    return Video(name, pixels, frames, questions, (f"{name}#0", f"{name}#1"))


VIDEOS = [video(f"v{i}", i) for i in range(4)]


# What is asked, and what is recorded


def test_every_question_is_asked_in_every_trial():
    reader, done = Counter(), []
    records = evaluate(reader, VIDEOS, TRIALS, PARAMS, done.append)
    assert [(r.video, r.trial, r.question) for r in records] == [
        (v.name, trial, key) for v in VIDEOS for trial in TRIALS for key in v.ids
    ]
    assert (reader.seen, len(reader.prefilled), done) == (4, 4 * len(TRIALS), [1] * 4)
    assert {r.kept for r in records if r.trial == NONE} == {0}
    for record in records:
        assert record.answer == (f"{record.kept}." if record.type == "count" else record.question[1:2])
        assert record.correct == (record.type == "when" or record.kept == 64)
        assert (record.total, record.prefill_ms) == (64, 5)
        assert record.tags == (() if record.type == "count" else ("brief",))
    for ratio in (0.1, 0.3):
        counts = {r.trial.method: r.kept for r in records if r.video == "v1" and r.trial.retention_ratio == ratio}
        assert counts.pop("tango-exact") == op.exact_count(4, 16, PARAMS.at(ratio))
        assert set(counts.values()) == {counts["tango"]}


def test_the_count_is_tangos_even_where_tango_is_no_trial():
    alone = evaluate(Counter(), VIDEOS, [Trial("topk", 0.3)], PARAMS)
    with_it = evaluate(Counter(), VIDEOS, [Trial("topk", 0.3), Trial("tango", 0.3)], PARAMS)
    assert [r.kept for r in alone] == [r.kept for r in with_it if r.trial.method == "topk"]


def test_what_is_drawn_hangs_on_the_video_and_the_seed_alone():
    class Remembering(Counter):
        def answer(self, tokens, questions):
            self.drawn = getattr(self, "drawn", [])
            self.drawn.append(tokens)
            return super().answer(tokens, questions)

    def drawn(videos, trials, seed=0):
        reader = Remembering()
        evaluate(reader, videos, trials, PARAMS, seed=seed)
        return reader.drawn[-1]

    mine = drawn(VIDEOS[:1], [Trial("random", 0.3)])
    np.testing.assert_array_equal(mine, drawn([VIDEOS[3], VIDEOS[0]], [Trial("topk", 0.1), Trial("random", 0.3)]))
    assert not np.array_equal(mine, drawn(VIDEOS[:1], [Trial("random", 0.3)], seed=1))


def test_bounds_have_no_ratio():
    assert trials_of(["none", "topk", "topk", "all"], [0.1, 0.2]) == [
        ALL,
        NONE,
        Trial("topk", 0.1),
        Trial("topk", 0.2),
    ]


def test_tango_runs_once_a_ratio(monkeypatch):
    ratios, prune = [], reference.prune

    def spy(features, salience, seconds, params):
        ratios.append(params.retention_ratio)
        return prune(features, salience, seconds, params)

    monkeypatch.setattr(reference, "prune", spy)
    evaluate(Counter(), VIDEOS[:1], TRIALS, PARAMS)
    assert ratios == [0.1] * 4 + [0.3] * 4  # tango once a ratio, its count for all


def test_an_unknown_method_is_no_trial():
    with pytest.raises(TangoError, match="there is no method 'magic'"):
        Trial("magic", 0.1)


# Several processes


def untimed(records):
    return [replace(record, prune_ms=0) for record in records]


@pytest.mark.parametrize("jobs", [1, 2])
def test_processes_give_what_one_gives(jobs):
    done, opened = [], []
    found = evaluate_in_parallel(Counter, VIDEOS, TRIALS, PARAMS, done.append, jobs=jobs, opened=opened.append)
    assert untimed(found) == untimed(evaluate(Counter(), VIDEOS, TRIALS, PARAMS))
    assert (sum(done), opened) == (len(VIDEOS), ["a counter"])
    assert not multiprocessing.active_children()


def refuse():
    raise TangoError("no room", "make some")


def test_an_error_in_a_process_is_told():
    with pytest.raises(TangoError, match=r"no room \(make some\)"):
        evaluate_in_parallel(refuse, VIDEOS, TRIALS, PARAMS, jobs=2)
    assert not multiprocessing.active_children()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_told():
    with pytest.raises(TangoError, match="a process has died"):
        evaluate_in_parallel(die, VIDEOS, TRIALS, PARAMS, jobs=2)


def test_no_process_sees_an_interrupt():
    """Not even the first, with which Python's resource tracker starts: so in an interpreter that has none yet."""
    code = "import functools, signal; from tango_calibration.parallel import map_in_processes; "
    code += "tell_blocked = functools.partial(functools.partial, signal.pthread_sigmask, signal.SIG_BLOCK); "
    code += "blocked = map_in_processes(tell_blocked, [(), ()], lambda done: None, jobs=2); "
    code += "print(blocked == [{signal.SIGINT}] * 2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_only_the_threads_of_blas_are_set(monkeypatch):
    name, other = BLAS_THREADS[:2]
    monkeypatch.setenv(name, "7")
    monkeypatch.delenv(other, raising=False)
    with child_settings():
        assert (os.environ[name], os.environ[other]) == ("1", "1")
        monkeypatch.setenv("OF_ANOTHER_THREAD", "stays")
    assert (os.environ[name], os.environ.get(other)) == ("7", None)
    assert os.environ["OF_ANOTHER_THREAD"] == "stays"


# A bundle


@pytest.fixture(scope="module")
def frames():
    """uint8 [4, 36, 64, 3]: a bright block wanders over noise."""
    pixels = np.random.default_rng(0).integers(0, 120, (4, 36, 64, 3), dtype=np.uint8)
    for i, frame in enumerate(pixels):
        frame[10:20, 6 * i : 6 * i + 10] = (230, 60, 40)
    return pixels


QUESTIONS = ("What happens in the video?", "why?", "Is the red ball left of the blue square?")


@pytest.fixture(scope="module")
def reader(tiny_bundle):
    return BundleEvaluator(tiny_bundle)


@pytest.mark.parametrize("method", ["all", "tango"])
def test_the_chain_answers_as_it_does_alone(reader, llm, frames, method):
    """Prefilling the video once and rewinding gives each question the answer that it gets in a run of its own."""
    asked = tuple(Question("q", text, "?") for text in QUESTIONS)
    clip = Video("clip", frames, 4, asked, QUESTIONS)
    records = evaluate(reader, [clip], [Trial(method, 0.25)], llm.bundle.manifest.params)
    for record in records:
        options = {"prune": False} if method == "all" else {"retention_ratio": 0.25}
        alone = llm.generate(frames, record.question, max_new_tokens=16, **options)
        assert record.answer == alone.text.strip()
        assert record.kept == alone.kept
    assert len({record.answer for record in records}) == 3


def test_the_chain_answers_without_a_video(reader, llm, frames):
    """As it does when the prompt has nothing but text: no video can be told from another."""
    clips = [
        Video(f"{i}", f, 4, (Question("q", QUESTIONS[0], "?"),), (f"{i}",))
        for i, f in enumerate((frames, frames[::-1]))
    ]
    first, second = evaluate(reader, clips, [NONE], llm.bundle.manifest.params)
    assert first.kept == second.kept == 0
    before, after = llm._prompt.encode(QUESTIONS[0])
    ids = np.concatenate([before, llm.bundle.manifest.prompt.after_video, after]).astype(np.int64)
    logits = OneSequence(llm._backend).prefill([llm._backend.embed(ids)], len(ids))
    text = llm._prompt.decode([int(np.argmax(logits))])
    assert text
    assert first.answer.startswith(text.strip())
    assert first.answer == second.answer


def test_a_rewound_sequence_goes_on_as_if_nothing_had_followed(llm):
    backend = OneSequence(llm._backend)
    first, second, other = (backend.embed(np.arange(n, dtype=np.int64) + n) for n in (9, 4, 6))
    whole = backend.prefill([first, second], 20)
    backend.prefill([first], 20)
    np.testing.assert_allclose(backend.extend(second), whole, rtol=1e-4, atol=1e-4)
    backend.decode(3)
    backend.rewind(9)
    changed = backend.extend(other)
    backend.rewind(9)
    np.testing.assert_allclose(backend.extend(second), whole, rtol=1e-4, atol=1e-4)
    assert not np.allclose(changed, whole, rtol=1e-2, atol=1e-2)


def test_no_question_sees_another(reader, frames):
    features, _ = reader.encode_video(
        np.stack([np.array(Image.fromarray(frame).resize((112, 112))) for frame in frames])
    )
    tokens = features.reshape(-1, features.shape[-1])
    together, _ = reader.answer(tokens, QUESTIONS)
    alone = [reader.answer(tokens, [question])[0][0] for question in QUESTIONS]
    assert together == alone == reader.answer(tokens, QUESTIONS[::-1])[0][::-1]


def test_the_answer_ends_where_the_context_does(tiny_bundle, reader, frames, tmp_path):
    manifest = json.loads((tiny_bundle / "bundle.json").read_text())
    tokens = np.zeros((20, manifest["decoder"]["hidden_size"]), np.float32)
    [whole], _ = reader.answer(tokens, QUESTIONS[:1])
    prompt = VideoLLM(tiny_bundle)._prompt
    text = sum(map(len, prompt.encode(QUESTIONS[0]))) + len(manifest["prompt"]["after_video"])
    for room in (3, 0):
        copy = shutil.copytree(tiny_bundle, tmp_path / f"{room}")
        manifest["decoder"]["context"] = 20 + text + room
        (copy / "bundle.json").write_text(json.dumps(manifest))
    [short], _ = BundleEvaluator(tmp_path / "3").answer(tokens, QUESTIONS[:1])
    assert whole.startswith(short) and whole != short != ""  # noqa: PT018
    with pytest.raises(TangoError, match=f"takes {20 + text} tokens, 20 of them video"):
        BundleEvaluator(tmp_path / "0").answer(tokens, QUESTIONS[:1])


def test_what_does_not_fit_is_refused_before_anything_runs(tiny_bundle, frames):
    bundle = Bundle.load(tiny_bundle)
    long = Video("long", frames, 500, (Question("q", "?", "x"),), ("long#0",))
    with pytest.raises(TangoError, match=r"long: the prompt takes .* 8000 of them video"):
        check_room(bundle, [long])
    special = Video("special", frames, 4, (Question("q", "<|im_end|>", "x"),), ("special#0",))
    with pytest.raises(TangoError, match=r"special: the question contains <\|im_end\|>"):
        check_room(bundle, [special])


# The command


@pytest.fixture
def folder(tmp_path, frames):
    """A folder of three videos, two questions about each."""
    lines = []
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, frame in enumerate(frames):
            Image.fromarray(frame + ord(name)).save(tmp_path / "data" / name / f"{i}.png")
        lines.append(
            {"video": name, "question": "Is it red?", "options": ["yes", "no"], "answer": "A", "type": "color"}
        )
        lines.append({"video": name, "question": "What is it?", "answer": "ball"})
    (tmp_path / "data/questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "data"


def run(*arguments):
    return main(["evaluate", *map(str, arguments)])


def test_the_command_writes_what_it_found(tiny_bundle, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(tiny_bundle, "--data", folder, "--frames", 4, "--retention-ratio", 0.1, 0.3, "--output", out) == 0
    printed, progress = capsys.readouterr()
    assert re.search(r"\| +0\.3 \| +\S+ \| +tango-norope \|", printed)
    assert "videos 100%" in progress
    found = json.loads((out / "results.json").read_text())
    assert found["conditions"]["questions"] == 6
    assert found["conditions"]["backend"] == str(BundleEvaluator(tiny_bundle, "ort-cpu"))
    assert found["conditions"]["parameters of tango"]["retention_ratio"] == [0.1, 0.3]
    assert [question["answer"] for question in found["questions"]] == ["yes", "ball"] * 3
    assert [(t["method"], t["retention_ratio"]) for t in found["trials"]] == [
        (t.method, t.retention_ratio) for t in TRIALS
    ]
    records = results.read(out / "results.json")
    direct = evaluate(
        BundleEvaluator(tiny_bundle), read_folder(folder, 4), TRIALS, Bundle.load(tiny_bundle).manifest.params
    )
    timeless = [replace(record, prune_ms=0, prefill_ms=0) for record in records]
    assert sorted(timeless, key=str) == sorted((replace(r, prune_ms=0, prefill_ms=0) for r in direct), key=str)
    assert Scores(records).accuracy(ALL).value == found["summaries"][0]["accuracy"]["value"]
    assert all(line in (out / "results.md").read_text() for line in printed.splitlines())
    picture = Image.open(out / "accuracy.png")
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_generated_clips_in_two_processes(tiny_bundle, capsys):
    asked = ("--videos", 2, "--questions", 2, "--frames", 8, "--method", "topk", "--retention-ratio", 0.1)
    assert run(tiny_bundle, *asked) == 0
    alone = capsys.readouterr().out
    assert run(tiny_bundle, *asked, "--jobs", 2) == 0
    both = capsys.readouterr().out
    milliseconds = re.compile(r"\| +[\d.]+ \| +[\d.]+ \|$", re.MULTILINE)
    assert milliseconds.sub("", alone) == milliseconds.sub("", both)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--method", "magic"], "there is no method 'magic'"),
        (["--retention-ratio", "1.5"], "argument --retention-ratio: '1.5' is not a number above 0 and at most 1"),
        (["--videos", "0"], "argument --videos: '0' is not a positive integer"),
        (["--seed", "-1"], "argument --seed: '-1' is not a non-negative integer"),
        (["--jobs", "0"], "argument --jobs: '0' is not a positive integer"),
        (["--frames", "4"], "a generated clip has at least 8 frames"),
        (["--data", "nowhere"], "there is no nowhere/questions.jsonl"),
        (["--data", "nowhere", "--questions", "3"], "--questions is for generated clips"),
        (["--frames", "512"], "test-0-512f: the prompt takes"),
        (["--output", "."], ". already exists"),
        (["--output", ".", "--overwrite"], ". has no results.json"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(tiny_bundle, capsys, arguments, error, monkeypatch):
    monkeypatch.setattr(BundleEvaluator, "encode_video", None)
    assert run(tiny_bundle, *arguments) == 2
    first, hint = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {error}")
    assert hint.startswith("hint: ")


def test_a_picture_needs_matplotlib(tiny_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(tiny_bundle, "--output", tmp_path / "out") == 2
    assert "matplotlib is not installed\nhint: pip install 'tango-edge[calibration]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_are_replaced_by_results(tiny_bundle, folder, tmp_path):
    asked = (tiny_bundle, "--data", folder, "--frames", 4, "--method", "topk", "--output", tmp_path / "out")
    assert [run(*asked), run(*asked), run(*asked, "--overwrite")] == [0, 2, 0]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_leaves_nothing(tiny_bundle, tmp_path, jobs):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "tests.fakes.paused_cli",
        "videos 25%",
        "evaluate",
        tiny_bundle,
        "--videos",
        8,
        "--questions",
        1,
    ]
    command += ["--frames", 8, "--method", "topk", "--retention-ratio", 0.1, "--jobs", jobs, "--output", out]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True, **pipes) as process:
        assert process.stderr.readline() == "videos 25%\n"
        os.killpg(process.pid, signal.SIGINT)
        process.stdin.close()  # so that it ends, whether or not it heeds the signal
        rest = process.stderr.read()  # ends when the last process that holds it has ended
    assert process.returncode == 2
    assert rest.splitlines()[-2] == "error: interrupted"
    assert "Traceback" not in rest
    assert "videos 100%" not in rest
    assert list(tmp_path.iterdir()) == []


# Results


@cache
def answered():
    return evaluate(Counter(), VIDEOS, TRIALS, PARAMS)


def found(run=0):
    """Records whose answers are all right for ``all``, all wrong for ``none``, and for the others wrong on a video."""
    return [replace(r, correct=r.trial == ALL or (r.trial != NONE and r.video != f"v{run}")) for r in answered()]


def summaries_of(*runs):
    scores = Scores.of_runs(runs)
    return [scores.summary(trial) for trial in scores.trials]


def test_results_of_runs_are_written_and_read(tmp_path):
    runs = [found(run=0), found(run=1)]
    results.write(tmp_path / "out", {"data": "mine"}, VIDEOS, combine(runs), summaries_of(*runs))
    text = (tmp_path / "out/results.md").read_text()
    assert "## Accuracy, 2 runs" in text
    assert "75.0 [75.0, 75.0]" in text
    again = results.read(tmp_path / "out/results.json")
    assert sorted(untimed(again), key=str) == sorted(untimed(combine(runs)), key=str)
    assert "runs" not in results.to_markdown({}, summaries_of(runs[0]))


def test_records_of_other_videos_are_not_written(tmp_path):
    with pytest.raises(TangoError, match="not those of the videos"):
        results.write(tmp_path / "out", {}, VIDEOS[::-1], found(), summaries_of(found()))
    assert not (tmp_path / "out").exists()


def rows_of(heading, lines):
    """The cells of a section's table, by method."""
    begin = lines.index(f"## {heading}")
    end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin:end] if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def ahead(summary, *bounds):
    """The same with another lead of tango: value, low, high."""
    return replace(summary, tango_ahead=Estimate(*bounds))


def test_tangos_lead_is_bold_where_it_is_sure():
    leads = {("topk", 0.1): (0.2, 0.1, 0.3), ("topk", 0.3): (0.2, -0.1, 0.3), ("grid", 0.3): (-0.1, -0.2, -0.05)}
    told = summaries_of(found())
    told = [ahead(s, *leads.get((s.trial.method, s.trial.retention_ratio), (0.0, 0.0, 0.0))) for s in told]
    rows = rows_of("Tango's lead", results.overall(told))
    assert rows["method"] == ["0.1", "0.3"]
    assert rows["topk"] == ["**+20.0 [+10.0, +30.0]**", "+20.0 [-10.0, +30.0]"]
    assert rows["grid"][1] == "**-10.0 [-20.0, -5.0]**"


def test_an_unequal_count_is_marked():
    rows = rows_of("Tango's lead", results.overall(summaries_of(found())))
    assert "tango" not in rows
    assert {method for method, cells in rows.items() if "*" in cells[0]} == {"tango-exact"}


def test_bounds_are_told_below_the_table():
    lines = results.overall(summaries_of(found()))
    assert not {"all", "none"} & rows_of("Accuracy", lines).keys()
    assert any(line.startswith("all 100.0 [100.0, 100.0]. none 0.0 [0.0, 0.0]. ") for line in lines)


def test_each_ratio_has_a_table_of_types():
    lines = results.by("type", summaries_of(found()))
    for ratio in ("0.1", "0.3"):
        rows = rows_of(f"Accuracy by type of question at {ratio}", lines)
        assert rows["method"] == ["count", "when"]
        assert [*rows][2:4] == ["all", "none"]
        assert rows["tango"] == ["75.0 [25.0, 100.0]"] * 2


def drawn_axes(summaries, file, monkeypatch):
    axes, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **b: (axes.extend(self.axes), savefig(self, *a, **b)))
    results.draw(summaries, file)
    return axes


def test_the_picture_is_drawn_over_what_was_kept(tmp_path, monkeypatch):
    summaries = [replace(s, share=0.0625) if s.trial.method == "tango" else s for s in summaries_of(found())]
    rivals, parts, *_ = drawn_axes(summaries, tmp_path / "picture.png", monkeypatch)
    for axes in (rivals, parts):
        [line] = [line for line in axes.lines if line.get_label() == "tango"]
        np.testing.assert_allclose(line.get_xdata(), 6.25)
        assert [text.get_text() for text in axes.texts] == ["all tokens", "no tokens"]
    assert {"topk", "tango-topk"} & {line.get_label() for line in rivals.lines} == {"topk"}


def test_leads_are_drawn_with_their_intervals(tmp_path, monkeypatch):
    summaries = [ahead(s, 0.1, 0.05, 0.2) for s in summaries_of(found()) if s.trial.method in ("all", "topk")]
    _, below = drawn_axes(summaries, tmp_path / "picture.png", monkeypatch)  # one column: there are rivals alone
    heights = [list(line.get_ydata()) for line in below.lines[1:]]
    assert heights == [pytest.approx([5, 20]), pytest.approx([10])] * 2


def crossed(summary):
    """A value outside of its own interval, as percentiles of a skewed ratio may have it."""
    return replace(summary, relative=Estimate(1.2, 1.3, 1.1))


@pytest.mark.parametrize(
    "change",
    [
        lambda records: summaries_of(records)[:1],
        lambda records: summaries_of(records)[:2],
        lambda records: summaries_of([replace(r, correct=False) for r in records]),  # nothing is relative to all
        lambda records: [crossed(summary) for summary in summaries_of(records)],
    ],
)
def test_a_picture_can_always_be_drawn(change, tmp_path):
    results.draw(change(found()), tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").width > 500


def test_the_answers_are_not_lost_to_a_picture(tmp_path, monkeypatch):
    def torn(summaries, file):
        file.write_bytes(b"half")
        raise ValueError("no fonts")

    monkeypatch.setattr(results, "draw", torn)
    with pytest.raises(TangoError, match=r"accuracy.png could not be drawn: no fonts"):
        results.write(tmp_path / "out", {}, VIDEOS, found(), summaries_of(found()))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"results.json", "results.md"}
    assert untimed(results.read(tmp_path / "out/results.json"))


def test_results_of_something_else_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"trials": [{}]}')
    with pytest.raises(TangoError, match="cannot be read as results"):
        results.read(tmp_path / "results.json")


def test_own_counts_are_methods():
    assert set(OWN_COUNT) < set(METHODS)
