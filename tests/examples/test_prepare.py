"""examples/08-cpp/prepare.py where it cannot do its work; tests/gpu/runtime/test_cpp.py has the rest."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.cpp import prepare
from examples.make_video import write
from tango_runtime.bundle import Bundle


@pytest.mark.parametrize(("option", "error"), [((), "error: "), (("--max-new-tokens", "0"), "--max-new-tokens is 0")])
def test_nothing_is_written_where_something_is_missing(bundle, tmp_path, monkeypatch, option, error):
    write(tmp_path / "clip.mp4")
    arguments = [bundle(), tmp_path / "clip.mp4", "What?", tmp_path / "clip", *option]
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match=error):
        prepare.main()
    assert not (tmp_path / "clip").exists()


def test_a_bundle_with_row_ends_is_refused(bundle, tmp_path, monkeypatch):
    folder = bundle("llava-video")
    monkeypatch.setattr("sys.argv", ["prepare.py", str(folder), "clip.mp4", "What?", str(tmp_path / "clip")])
    with pytest.raises(SystemExit, match="prompts of a llava-video bundle have row ends"):
        prepare.main()


@pytest.mark.parametrize("form", ["portable", "device"])
def test_a_clip_names_the_engine_of_every_graph_and_the_weights_beside_it(bundle, tmp_path, monkeypatch, form):
    write(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.0"))
    monkeypatch.setattr(prepare, "current_target", lambda version: None)
    engine = SimpleNamespace(path=tmp_path / "an.engine", stripped=False, version_compatible=False, form=form)
    prune = SimpleNamespace(**vars(engine) | {"form": "portable"})
    asked = []
    monkeypatch.setattr(
        prepare.engines,
        "find",
        lambda bundle, graph, *more: asked.append(graph) or (prune if graph == "prune" else engine),
    )
    arguments = [bundle(), tmp_path / "clip.mp4", "What?", tmp_path / "clip", "--frames", "4"]
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, arguments)])
    prepare.main()
    assert asked == ["vision", "prune", "embed", "decoder"]
    told = dict(line.split(" ", 1) for line in (tmp_path / "clip" / "clip.txt").read_text().splitlines())
    assert [told[graph] for graph in asked] == [str(engine.path)] * 4
    assert len(told["seconds"].split()) == 4
    graphs = ("vision", "embed", "decoder") if form == "device" else ()
    assert {name for name in told if name.endswith("_weights")} == {f"{graph}_weights" for graph in graphs}
    specs = Bundle.load(bundle()).manifest.graphs
    for graph in graphs:
        data, *weights = Path(told[f"{graph}_weights"]).read_text().splitlines()
        assert data == str((bundle() / specs[graph].data).resolve())
        assert weights == [f"{weight.offset} {name}" for name, weight in specs[graph].device_weights.items()]


def test_a_bundle_with_positions_on_three_axes_is_refused(qwen_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prepare.py", str(qwen_bundle()), "clip.mp4", "What?", str(tmp_path / "clip")])
    with pytest.raises(SystemExit, match=r"positions of a qwen2\.5-vl bundle have three axes"):
        prepare.main()
