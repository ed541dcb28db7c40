"""Which files an ONNX graph keeps tensors in, read without onnx, and what a bundle does about them."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from onnx import TensorProto, helper

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle, describe, write_manifest
from tango_runtime.bundle.external_data import external_files
from tests.runtime.bundle.test_bundle import write_bundle


def tensor(location, keys=("location", "offset")):
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key in keys:
        made.external_data.add(key=key, value=location if key == "location" else "0")
    return made


def in_initializer(made):
    return helper.make_graph([], "g", [], [], [made])


def in_sparse_initializer(made):
    graph = helper.make_graph([], "g", [], [])
    graph.sparse_initializer.add(values=made, indices=made)
    return graph


def in_constant(made):
    return helper.make_graph([helper.make_node("Constant", [], ["w"], value=made)], "g", [], [])


def in_list_of_tensors(made):
    node = helper.make_node("X", [], ["w"], domain="x")
    node.attribute.append(helper.make_attribute("many", [made]))
    return helper.make_graph([node], "g", [], [])


def in_branch(made):
    branches = {"then_branch": in_constant(made), "else_branch": in_initializer(made)}
    return helper.make_graph([helper.make_node("If", ["c"], ["y"], **branches)], "g", [], [])


PLACES = [in_initializer, in_sparse_initializer, in_constant, in_list_of_tensors, in_branch]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["w.data", "../secret", "/etc/passwd", "\u00e9"])
@pytest.mark.parametrize("keys", [("location", "offset"), ("offset", "location"), ("location", "location")])
def test_a_tensor_anywhere_in_a_graph_is_found(tmp_path, place, location, keys):
    file = tmp_path / "x.onnx"
    file.write_bytes(helper.make_model(place(tensor(location, keys))).SerializeToString())
    assert external_files(file) == {location}


def test_a_tensor_in_a_function_is_found(tmp_path):
    node = helper.make_node("Constant", [], ["w"], value=tensor("w.data"))
    function = helper.make_function("x", "F", [], ["w"], [node], [helper.make_opsetid("", 17)])
    file = tmp_path / "x.onnx"
    file.write_bytes(helper.make_model(helper.make_graph([], "g", [], []), functions=[function]).SerializeToString())
    assert external_files(file) == {"w.data"}


KEY, VALUE = b"\x0a\x08location", b"\x12\x01w"


@pytest.mark.parametrize("entry", [KEY + VALUE, VALUE + KEY, KEY + KEY + VALUE, b"\x18\x01" + KEY + VALUE])
def test_fields_in_any_order_are_found(tmp_path, entry):
    for field in (13, 5, 7):  # an entry of a tensor of a graph of a model
        entry = bytes([field << 3 | 2, len(entry)]) + entry
    (tmp_path / "x.onnx").write_bytes(entry)
    assert onnx.load(tmp_path / "x.onnx", load_external_data=False).graph.initializer[0].external_data[0].value == "w"
    assert external_files(tmp_path / "x.onnx") == {"w"}


@pytest.mark.parametrize("content", [b"\x3a\x05", b"\x3a", b"\x3a" + b"\xff" * 11, b"\x3b", b"\x39\x00", b"no graph"])
def test_what_is_no_graph_is_an_error(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ValueError, match="it "):
        external_files(tmp_path / "x.onnx")


def vision_keeps_weights_in(folder, location):
    """Puts another vision graph into a bundle."""
    manifest = Bundle.load(folder).manifest
    (folder / "vision.onnx").write_bytes(helper.make_model(in_initializer(tensor(location))).SerializeToString())
    write_manifest(folder, replace(manifest, files=manifest.files | {"vision.onnx": describe(folder / "vision.onnx")}))


@pytest.mark.parametrize("location", ["../secret", "{}/secret", "bundle.json", "embed.onnx.data", "*/_ORT_MEM_ADDR_/*"])
def test_a_bundle_whose_graph_names_another_file_than_its_own_is_refused(tmp_path, location):
    folder, location = write_bundle(tmp_path / "bundle"), location.format(tmp_path)
    vision_keeps_weights_in(folder, "vision.onnx.data")
    vision_keeps_weights_in(folder, location)
    with pytest.raises(TangoError) as caught:
        Bundle.load(folder)
    assert f"vision.onnx keeps weights in {location!r}" in caught.value.message


def test_a_bundle_whose_graph_is_none_is_refused(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    (folder / "embed.onnx").write_bytes(b"no graph".ljust((folder / "embed.onnx").stat().st_size))
    with pytest.raises(TangoError, match=r"embed\.onnx is no ONNX graph"):
        Bundle.load(folder)
