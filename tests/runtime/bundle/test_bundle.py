"""bundle.json: every key, every type and every file is checked, and the message names the place."""

from __future__ import annotations

import json
import os
import re

import pytest

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import (
    FORMAT,
    WEIGHT_ALIGNMENT,
    Bundle,
    DecoderSpec,
    GraphSpec,
    Manifest,
    PromptSpec,
    RotarySpec,
    Source,
    TensorSpec,
    VideoSpec,
    VisionSpec,
    WeightQuantization,
    WeightSpec,
    describe,
    write_manifest,
)
from tango_runtime.cli.main import main

GRAPHS = ("vision", "prune", "embed", "decoder")


def onnx_file(producer):
    """An ONNX file with the name of what made it, and no graph: field 2 of the message."""
    return bytes([2 << 3 | 2, len(producer)]) + producer.encode()


def write_bundle(folder):
    folder.mkdir()
    tensors = (TensorSpec("x", "float16", ("N", 8)),)
    for name in GRAPHS:
        (folder / f"{name}.onnx").write_bytes(onnx_file(f"the {name} graph"))
    (folder / "tokenizer.json").write_text("{}")
    decoder = DecoderSpec(2, 896, 4864, 14, 2, 64, 8192, 1e-6)
    cache = [TensorSpec(f"past_{i}", "float16", (2, "P", 64)) for i in range(4)]
    inputs = (TensorSpec("embeddings", "float16", ("N", 896)), TensorSpec("positions", "int64", ("N",)), *cache)
    graphs = {n: GraphSpec(f"{n}.onnx", 17, ("onnxruntime", "tensorrt"), tensors, tensors) for n in GRAPHS}
    frames, features = TensorSpec("frames", "uint8", ("F", 384, 384, 3)), TensorSpec("x", "float16", ("F", 196, 896))
    graphs["vision"] = GraphSpec("vision.onnx", 17, ("onnxruntime",), (frames,), (features,))
    logits = (TensorSpec("logits", "float32", (151648,)),)
    graphs["decoder"] = GraphSpec("decoder.onnx", 17, ("onnxruntime",), inputs, logits)
    manifest = Manifest(
        format=FORMAT,
        family="llava-ov",
        dtype="float16",
        video=VideoSpec(32, (384, 384), "bicubic", 196, 1, "floor"),
        prompt=PromptSpec("<video>", (31,), (151645, 151643), 151648),
        vision=VisionSpec(26, 1152, 4304, 16, 729, (1152 * 896, 896**2), "plain"),
        decoder=decoder,
        config={},
        prune=op.attributes(PruneParams()),
        graphs=graphs,
        source=Source("llava", "tango-edge 0"),
        files={file.name: describe(file) for file in sorted(folder.iterdir())},
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The parsed bundle.json of a sound bundle."""
    return json.loads((write_bundle(tmp_path_factory.mktemp("sound") / "bundle") / "bundle.json").read_text())


def edit(folder, edit):
    file = folder / "bundle.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def at(data, path):
    for key in path:
        data = data[key]
    return data


def load_error(folder, **options):
    with pytest.raises(TangoError) as caught:
        Bundle.load(folder, **options)
    assert caught.value.hint
    return caught.value.message


def paths(data, here=()):
    """Every place in the parsed file; of a list, its first item."""
    yield here
    items = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in items:
        yield from paths(value, (*here, key))


def test_what_is_written_is_read(folder):
    bundle = Bundle.load(folder, verify=True)
    assert bundle.manifest.params == PruneParams()
    assert bundle.graph("decoder") == folder / "decoder.onnx"
    assert bundle.manifest.graphs["embed"].inputs[0].shape == ("N", 8)
    write_manifest(folder, bundle.manifest)
    assert Bundle.load(folder) == bundle


def test_every_missing_key_is_named(folder, sound):
    for path in [path for path in paths(sound) if path and isinstance(path[-1], str)]:
        if (path[:1] == ("prune",) and len(path) > 1) or (path[:1] == ("files",) and len(path) == 2):
            continue  # an attribute has a default; a file that is not listed is the business of another test
        data = json.loads(json.dumps(sound))
        del at(data, path[:-1])[path[-1]]
        (folder / "bundle.json").write_text(json.dumps(data))
        message = load_error(folder)
        assert f"has no {path[-1]!r}" in message, path
        assert all(str(key) in message for key in path), (path, message)


def test_every_unknown_key_is_named(folder, sound):
    for path in [path for path in paths(sound) if isinstance(at(sound, path), dict)]:
        data = json.loads(json.dumps(sound))
        at(data, path)["color"] = "red"
        (folder / "bundle.json").write_text(json.dumps(data))
        message = load_error(folder)
        assert "color" in message, path
        assert all(str(key) in message for key in path), (path, message)


@pytest.mark.parametrize("wrong", [None, True, 1.5, {"x": 1}, [{}]])
def test_every_wrong_type_is_named(folder, sound, wrong):
    for path in paths(sound):
        if path == ("format",) or (path == ("decoder", "norm_eps") and isinstance(wrong, float)):
            continue
        data = json.loads(json.dumps({"": sound}))
        at(data, ("", *path)[:-1])[("", *path)[-1]] = wrong
        (folder / "bundle.json").write_text(json.dumps(data[""]))
        message = load_error(folder)
        assert "bundle.json" in message, path
        assert all(key in message for key in path if isinstance(key, str)), (path, message)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dtype",), "bfloat16"),
        (("video", "resample"), "nearest"),
        (("video", "frames"), "32"),
        (("decoder", "layers"), 24.0),
        (("graphs", "vision", "runtimes", 0), "tvm"),
        (("graphs", "vision", "inputs", 0, "dtype"), "float"),
        (("prompt", "stop", 1), "<|im_end|>"),
        (("prune", "retention_ratio"), "0.1"),
        (("prune", "retention_ratio"), 20000),
        (("prune", "grid"), [14]),
        (("prune", "budget"), "none"),
        (("prune", "merge_order"), 1),
    ],
)
def test_wrong_value_is_named(folder, path, value):
    def spoil(data):
        at(data, path[:-1])[path[-1]] = value

    edit(folder, spoil)
    message = load_error(folder)
    assert "bundle.json" in message
    assert all(str(key) in message for key in path if isinstance(key, str)), message


#: What is no size of anything, as Python's JSON reads it.
NO_NUMBER = [float("nan"), float("inf"), -1, 2**31, 2**70, 10**400, True, "1"]


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize(
    "path",
    [
        ("video", "frames"),
        ("video", "size", 0),
        ("prompt", "after_video", 0),
        ("prompt", "stop", 0),
        ("prompt", "vocabulary"),
        ("prompt", "row_end"),
        ("vision", "layers"),
        ("decoder", "context"),
        ("decoder", "norm_eps"),
        ("prune", "neighbors"),
        ("prune", "sink_positions"),
        ("graphs", "vision", "opset"),
        ("graphs", "embed", "inputs", 0, "shape", 1),
    ],
)
def test_a_number_out_of_range_is_named(folder, path, value):
    if path[-1] == 1 and value == "1":
        pytest.skip("an axis may have a name")

    def spoil(data):
        at(data, path[:-1])[path[-1]] = value

    edit(folder, spoil)
    message = load_error(folder)
    assert len(message) < 500
    assert all(str(key) in message for key in path if isinstance(key, str)), message


@pytest.mark.parametrize("text", ["NaN", "1e999", "-Infinity", "9" * 5000])
def test_a_number_that_is_none_is_named(folder, text):
    file = folder / "bundle.json"
    file.write_text(file.read_text().replace('"context": 8192', f'"context": {text}'))
    assert "bundle.json" in load_error(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("decoder", "layers"), 99),
        (("decoder", "layers"), 2**31 - 1),
        (("decoder", "kv_heads"), 7),
        (("prompt", "vocabulary"), 1),
    ],
)
def test_dimensions_that_contradict_the_graph_are_refused(folder, path, value):
    edit(folder, lambda data: data[path[0]].update({path[1]: value}))
    assert "do not fit the tensors of graphs: decoder" in load_error(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{seconds}", "video_text has an unknown field 'seconds'"),
        ("{duration.real}", "video_text has an unknown field 'duration.real'"),
        ("{}", "video_text has an unknown field ''"),
        ("{times", "video_text is no format string"),
        ("{frames:.2q}", "video_text has a field of the form '.2q'"),
        ("{duration:999999999}", "video_text has a field of the form '999999999'"),
    ],
)
def test_a_text_about_the_video_that_cannot_be_filled_in_is_refused(folder, text, message):
    edit(folder, lambda data: data["prompt"].update(video_text=text))
    assert f"bundle.json: prompt: {message}" in load_error(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("video", "size"), [384, 383]),
        (("graphs", "vision", "inputs"), []),
        (("graphs", "vision", "outputs", 0, "shape", 1), 195),
    ],
)
def test_frames_that_contradict_the_graph_are_refused(folder, path, value):
    def spoil(data):
        at(data, path[:-1])[path[-1]] = value

    edit(folder, spoil)
    assert "do not fit the tensors of graphs: vision" in load_error(folder)


@pytest.mark.parametrize(("key", "rows"), [("after_video", [31, 32]), ("row_end", 32)])
def test_a_row_that_the_table_does_not_have_is_refused(with_device_graphs, key, rows):
    edit(with_device_graphs, lambda data: data["prompt"].update({key: rows}))
    assert f"prompt: {key} is not in the table of 32 rows" in load_error(with_device_graphs)


@pytest.mark.parametrize(("depth", "error"), [(1, "device has a device graph of its own"), (300, "nested too deeply")])
def test_device_graphs_within_device_graphs_are_refused(with_device_graphs, depth, error):
    def nest(data):
        device = data["graphs"]["decoder"]["device"]
        for _ in range(depth):
            device = {**device, "device": device}
        data["graphs"]["decoder"]["device"] = device

    edit(with_device_graphs, nest)
    assert error in load_error(with_device_graphs)


@pytest.fixture
def with_device_graphs(folder):
    """A bundle whose embedding and decoder have device graphs that take their weights."""

    def edit_graphs(data):
        for name, shape in (("embed", [32, 896]), ("decoder", [896, 32])):
            graph, weight = data["graphs"][name], {"dtype": "float16", "shape": shape}
            taken = {"name": f"{name}.weight", **weight}
            graph["weights"] = {
                "norm.weight": {"dtype": "float32", "shape": [896], "offset": 0},
                taken["name"]: {**weight, "offset": 3584},
            }
            graph["device"] = {**graph, "file": f"{name}.fused.onnx", "inputs": [*graph["inputs"], taken]}
            del graph["device"]["weights"]
            size = 3584 + 2 * shape[0] * shape[1]
            (folder / f"{name}.fused.onnx").write_bytes(onnx_file("a device graph"))
            (folder / f"{name}.onnx.data").touch()
            os.truncate(folder / f"{name}.onnx.data", size)
            for file in (f"{name}.fused.onnx", f"{name}.onnx.data"):
                data["files"][file] = {"size": (folder / file).stat().st_size, "sha256": ""}

    edit(folder, edit_graphs)
    return folder


def test_weight_offsets_survive_a_round_trip(with_device_graphs):
    bundle = Bundle.load(with_device_graphs)
    spec = bundle.manifest.graphs["decoder"]
    assert (spec.data, list(spec.device_weights)) == ("decoder.onnx.data", ["decoder.weight"])
    assert spec.weights["norm.weight"] == WeightSpec("float32", (896,), 0)
    assert bundle.manifest.graphs["vision"].device_weights == {}
    write_manifest(with_device_graphs, bundle.manifest)
    assert Bundle.load(with_device_graphs) == bundle


@pytest.mark.parametrize("graph", ["embed", "decoder"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [896, 896]}, "is not what device: inputs takes"),
        ({"dtype": "float32"}, "is not what device: inputs takes"),
        ({"offset": 3584 + WEIGHT_ALIGNMENT}, "is not inside"),
        ({"offset": 3583}, "is not inside"),
    ],
)
def test_weights_that_do_not_fit_are_refused(with_device_graphs, graph, change, words):
    edit(with_device_graphs, lambda data: data["graphs"][graph]["weights"][f"{graph}.weight"].update(change))
    assert f"graphs: {graph}: weights: {graph}.weight {words}" in load_error(with_device_graphs)


def test_a_missing_weight_is_named(with_device_graphs):
    edit(with_device_graphs, lambda data: data["graphs"]["decoder"]["weights"].pop("decoder.weight"))
    assert "graphs: decoder: weights has no 'decoder.weight'" in load_error(with_device_graphs)
    edit(with_device_graphs, lambda data: data["graphs"]["decoder"].pop("weights"))
    assert "graphs: decoder: weights has no 'decoder.weight'" in load_error(with_device_graphs)


@pytest.mark.parametrize("key", ["device", "weights"])
def test_a_device_decoder_without_the_embeddings_table_is_refused(with_device_graphs, key):
    edit(with_device_graphs, lambda data: data["graphs"]["embed"].pop(key))
    assert "decoder has a device graph, embed has none that takes its table" in load_error(with_device_graphs)


def test_weights_without_their_data_file_are_refused(with_device_graphs):
    edit(with_device_graphs, lambda data: data["files"].pop("decoder.onnx.data"))
    assert "norm.weight is not inside decoder.onnx.data, of 0 bytes" in load_error(with_device_graphs)


@pytest.mark.parametrize("graph", GRAPHS)
def test_missing_graph_is_named(folder, graph):
    edit(folder, lambda data: data["graphs"].pop(graph))
    message = load_error(folder)
    assert "bundle.json" in message
    assert graph in message


def test_graph_whose_file_is_not_listed_is_named(folder):
    edit(folder, lambda data: data["files"].pop("decoder.onnx"))
    (folder / "decoder.onnx").unlink()
    assert "decoder.onnx" in load_error(folder)


@pytest.mark.parametrize("number", [0, 1, "2", None, True, 2.0])
def test_another_format_is_refused(folder, number):
    edit(folder, lambda data: data.update(format=number))
    assert re.search(r"bundle\.json.*format", load_error(folder))


@pytest.mark.parametrize("text", ["", "{", "\udcff", "[]", "null", '"bundle"', "[" * 100_000, '{"a":' * 990 + "1"])
def test_file_that_is_no_json_object(folder, text):
    (folder / "bundle.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "bundle.json" in load_error(folder)


def test_a_hash_that_is_there_twice_is_refused(folder):
    file = folder / "bundle.json"
    text = file.read_text()
    file.write_text(text.replace('"sha256": ', f'"sha256": "{"0" * 64}", "sha256": ', 1))
    assert load_error(folder) == f'{file} is not JSON: an object has the key "sha256" twice'


def test_no_bundle(folder, tmp_path):
    assert str(tmp_path / "away") in load_error(tmp_path / "away")
    assert str(tmp_path) in load_error(tmp_path)
    assert "tokenizer.json" in load_error(folder / "tokenizer.json")


@pytest.mark.parametrize("name", ["decoder.onnx", "tokenizer.json"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"has no {name}" in load_error(folder)


def test_cut_file_is_named(folder):
    os.truncate(folder / "vision.onnx", 5)
    assert re.search(r"vision\.onnx has 5 bytes, .* says 18", load_error(folder))


def test_changed_file_is_named_with_verify(folder):
    (folder / "vision.onnx").write_bytes(onnx_file("THE VISION GRAPH"))
    Bundle.load(folder)
    assert "vision.onnx has changed" in load_error(folder, verify=True)


def test_inspect_through_the_command_line(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    assert "llava-ov, float16" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--verify"]) == 0
    (folder / "embed.onnx").write_bytes(onnx_file("THE EMBED GRAPH"))
    assert main(["inspect", str(folder)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(folder), "--verify"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert "embed.onnx has changed" in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("command", ["inspect", "validate"])
def test_commands_refuse_a_bundle_that_lacks_a_graph(folder, capsys, command):
    if command == "validate":
        pytest.importorskip("torch")
    edit(folder, lambda data: data["graphs"].pop("decoder"))
    assert main([command, str(folder)]) == 2
    assert "decoder" in capsys.readouterr().err


@pytest.mark.parametrize("of", ["a file", "a graph"])
@pytest.mark.parametrize(
    "name", ["../secret", "{}/secret", "a/../../secret", "a/b", "a\\b", "C:\\a", "", ".", "..", "a\0b", "bundle.json"]
)
def test_a_name_outside_of_the_bundle_is_refused(folder, tmp_path, name, of):
    (tmp_path / "secret").write_text("secret")
    name = name.format(tmp_path)
    if of == "a file":
        edit(folder, lambda data: data["files"].update({name: {"size": 6, "sha256": ""}}))
    else:
        edit(folder, lambda data: data["graphs"]["vision"].update(file=name))
    assert "is not a name inside of the bundle" in load_error(folder)


def test_a_graph_of_another_format_is_refused(folder):
    edit(folder, lambda data: data["graphs"]["vision"].update(file="vision.ort"))
    assert "'vision.ort' is not the name of an ONNX file" in load_error(folder)


@pytest.mark.parametrize("name", ["vision.onnx", "tokenizer.json", "bundle.json", "unlisted.data", "engines"])
def test_a_link_that_leads_outside_is_refused(folder, tmp_path, name):
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.mkdir()
    (folder / name).symlink_to(outside)
    assert f"{folder / name} is a link that leads outside" in load_error(folder)


def test_a_link_that_stays_inside_is_followed(folder):
    (folder / "vision.onnx").rename(folder / "moved")
    (folder / "vision.onnx").symlink_to("moved")
    Bundle.load(folder, verify=True)


def test_a_bundle_whose_path_is_not_utf8_is_refused(folder, tmp_path):
    path = tmp_path / os.fsdecode(b"bundle\xff")
    folder.rename(path)
    assert "is not valid UTF-8" in load_error(path)


def test_a_newer_format_asks_for_a_newer_version(folder):
    edit(folder, lambda data: data.update(format=FORMAT + 1))
    with pytest.raises(TangoError) as caught:
        Bundle.load(folder)
    assert caught.value.hint == "install the tango-edge that made it, or a newer one"


def test_another_format_names_the_command_that_exports_again(folder):
    source = {"checkpoint": "a llava", "siglip": "siglip", "exporter": "tango-edge 0"}  # as format 2 had it
    edit(folder, lambda data: data.update(format=2, source=source))
    edit(folder, lambda data: data["prune"].update(sink_positions=[3, 5]))
    with pytest.raises(TangoError) as caught:
        Bundle.load(folder)
    assert caught.value.hint == (
        "export it again: tango-export --model llava-ov --checkpoint 'a llava' --salience-checkpoint siglip "
        "--context 8192 --sink-positions 3 5 --output FOLDER"
    )


def test_quantized_weights_have_a_place(with_device_graphs):
    layout = {"bits": 4, "group_size": 128, "scales": "norm.weight"}
    weights = ("graphs", "decoder", "weights")
    edit(with_device_graphs, lambda data: at(data, weights)["decoder.weight"].update(quantization=layout))
    weight = Bundle.load(with_device_graphs).manifest.graphs["decoder"].weights["decoder.weight"]
    assert weight.quantization == WeightQuantization(4, 128, "norm.weight")
    layout["zero_points"] = "nowhere"
    edit(with_device_graphs, lambda data: at(data, weights)["decoder.weight"].update(quantization=layout))
    assert "weights has no 'nowhere'" in load_error(with_device_graphs)


def test_positions_on_three_axes_are_an_input_of_the_decoder(folder):
    rotary = {"sections": [8, 12, 12], "time_step": "seconds", "tokens_per_second": 2, "positions": 128000}
    edit(folder, lambda data: data["decoder"].update(rotary=rotary))
    assert "do not fit the tensors of graphs: decoder" in load_error(folder)
    axis = {"name": "rotary", "dtype": "int64", "shape": [3, "N"]}
    edit(folder, lambda data: data["graphs"]["decoder"]["inputs"].insert(2, axis))
    assert Bundle.load(folder).manifest.decoder.rotary == RotarySpec((8, 12, 12), "seconds", 2, 128000)
    edit(folder, lambda data: data["decoder"]["rotary"].update(sections=[8, 12, 13]))
    assert "sections do not fit head_dim 64" in load_error(folder)
