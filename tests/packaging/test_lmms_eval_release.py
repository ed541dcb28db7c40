"""lmms-eval's released package runs a task of generated clips, through both of its doors to a bundle."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tests.packaging.installs import ROOT, run

pytestmark = [pytest.mark.network, pytest.mark.slow]  # a package index is asked; it takes minutes

TINY = ROOT / "models" / "tiny"
FRAMES, RATIO = 16, 0.1

#: What lmms-eval imports for such a task, of the fifty packages that it requires; the rest the tests have already.
NEEDED = (
    *("datasets", "accelerate", "evaluate", "sacrebleu", "pytablewriter", "loguru", "tenacity", "python-dotenv"),
    "openai",
)

#: An environment in which the wheel is what is imported.
ALONE = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

TASK = """\
task: quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function quiz.video
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the wheel and lmms-eval, which sees the tests' own packages, torch among them, behind those."""
    folder = tmp_path_factory.mktemp("lmms-eval") / "venv"
    run(sys.executable, "-m", "venv", folder)
    found = folder / "bin" / "python"
    purelib = Path(run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (purelib / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    for requirements in (
        ("--no-deps", wheel, "lmms-eval>=0.7.3,<0.8"),
        ("--constraint", ROOT / "constraints.txt", *NEEDED),
    ):
        done = subprocess.run([str(part) for part in (*pip, *requirements)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"lmms-eval cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of models/tiny, videos with questions, and a task that asks them."""
    from examples.make_clip import write
    from tango_calibration.data.synthetic import make_clip
    from tango_export.export import Request, export

    found = tmp_path_factory.mktemp("quiz")
    checkpoints = str(TINY / "llava"), str(TINY / "siglip")
    export(Request("llava-ov", *checkpoints, found / "tiny", context=12800, sink_positions=()))
    videos = found / "videos"
    videos.mkdir()
    lines = []
    for seed in range(2):
        made = make_clip(seed, "test", FRAMES)
        write(videos / f"{seed}.mp4", made)
        for question in made.questions(np.random.default_rng((0, seed)), 5):
            lines.append({"video": f"{seed}.mp4", "question": question.text, "answer": question.answer})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (videos / "questions.jsonl").write_text(text)
    (found / "tasks").mkdir()
    (found / "tasks" / "quiz.yaml").write_text(TASK.format(folder=videos))
    (found / "tasks" / "quiz.py").write_text(f"def video(doc): return [{str(videos)!r} + '/' + doc['video']]\n")
    return found


@pytest.fixture
def evaluated(python: Path, folder: Path, tmp_path: Path):
    """``evaluated(door, **model_args)``: the score that lmms-eval gives, and the answers to its questions."""

    def call(door: str, **given: object) -> tuple[float, list[str]]:
        options = ",".join(f"{key}={value}" for key, value in given.items())
        command = [python, "-m", "lmms_eval", "--model", door, "--model_args", options, "--tasks", "quiz"]
        command += ["--include_path", folder / "tasks", "--output_path", tmp_path / door, "--log_samples"]
        home = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
        done = subprocess.run([str(part) for part in command], env=ALONE | home, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (result,) = (tmp_path / door).rglob("*_results.json")
        (samples,) = (tmp_path / door).rglob("*_samples_quiz.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        answers = [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
        return json.loads(result.read_text())["results"]["quiz"]["exact_match,none"], answers

    return call


@pytest.fixture
def url(python: Path, folder: Path):
    """Address of a server of the bundle."""
    command = [python, "-m", "tango_runtime.cli.main", "serve", folder / "tiny", "--port", "0"]
    command += ["--media-root", folder / "videos"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(
        [str(part) for part in command], env=environment, stderr=subprocess.PIPE, text=True
    ) as served:
        try:
            found = next((line for line in served.stderr if line.startswith("serving at ")), "")
            yield re.search(r"http://\S+", found)[0]
        finally:
            served.terminate()
            served.communicate()


def test_both_doors_give_the_score_of_tango_evaluate(evaluated, url, folder, tmp_path, capsys):
    from tango_runtime.cli.main import main

    questions, answers = folder / "videos" / "questions.jsonl", tmp_path / "answers.jsonl"
    options = ["--frames", str(FRAMES), "--retention-ratio", str(RATIO)]
    batch = ["batch", str(folder / "tiny"), str(questions), "--output", str(answers), "--max-new-tokens", "8"]
    assert main([*batch, *options, "--decoders", "0"]) == 0
    scored = ["evaluate", "--data", str(folder / "videos"), "--answers", str(answers), "--output", str(tmp_path / "s")]
    assert main([*scored, "--frames", str(FRAMES)]) == 0
    capsys.readouterr()
    wanted = {(row["video"], row["question"]): row["answer"] for row in map(json.loads, answers.open())}
    asked = [(row["video"], row["question"]) for row in map(json.loads, questions.open())]
    (summary,) = json.loads((tmp_path / "s" / "results.json").read_text())["summaries"]

    here = evaluated("tango", bundle=folder / "tiny", retention_ratio=RATIO, frames=FRAMES, decoders=1)
    served = evaluated(
        "openai", model="tiny", base_url=f"{url}/v1", pass_video_url=True, max_frames_num=FRAMES, timeout=600
    )
    assert here == served
    assert here[1] == [wanted[question] for question in asked]
    assert 0 < here[0] < 1
    assert here[0] == pytest.approx(summary["accuracy"]["value"])
