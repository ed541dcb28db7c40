"""Which engines are planned, what their keys depend on, and which are rejected."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace

import pytest

from tango_plugins import TangoError
from tango_runtime.backends.ort_cpu import check_runtime
from tango_runtime.bundle import Bundle, FileSpec, Quantization, sha256
from tango_runtime.engines import DECODE, FORMAT, PREFILL, BuildOptions, Sidecar, Target, find, plan_engines

H200 = Target("8.6.0", "9.0", "NVIDIA H200", plugin="1")
ORIN = Target("10.3.0", "8.7", "Orin", plugin="1")


@pytest.fixture(scope="module")
def exported(bundle):
    return bundle()


@pytest.fixture
def loaded(exported, tmp_path):
    """A copy of a bundle, to write engines into."""
    return Bundle.load(shutil.copytree(exported, tmp_path / "a bundle"))


def planned(bundle, machine=H200, graphs=("vision", "prune", "embed", "decoder"), **options):
    return {one.graph: one for one in plan_engines(bundle, machine, BuildOptions(**options), graphs)}


def put(one, machine=H200, content=b"engine", **changes):
    """Writes the files of a finished build."""
    one.path.parent.mkdir(exist_ok=True)
    one.path.write_bytes(content)
    sidecar = Sidecar(FORMAT, one.spec, machine.gpu, len(content), sha256(one.path), 1.0, 0)
    one.path.with_suffix(".json").write_text(json.dumps(asdict(replace(sidecar, **changes))))
    return one


def put_all(bundle, machine=H200, **options):
    return {graph: put(one, machine) for graph, one in planned(bundle, machine, **options).items()}


def find_error(bundle, graph, machine=H200, *arguments, **options):
    with pytest.raises(TangoError) as error:
        find(bundle, graph, machine, *arguments, **options)
    return error.value


def test_two_profiles_of_a_portable_decoder(loaded):
    prefill, decode = planned(loaded, max_tokens=100, context=300, form="portable")["decoder"].profiles
    width, heads = loaded.manifest.decoder.hidden_size, loaded.manifest.decoder.kv_heads
    low, typical, high = prefill["embeddings"]
    assert (low, high) == ((1, width), (100, width))
    assert 1 < typical[0] <= 100
    assert [shape[1] for shape in prefill["past_key.0"]] == [0, 0, 300]
    assert [shape[1] for shape in decode["past_value.0"]] == [300, 300, 300]
    assert decode["past_value.0"][0][0] == heads
    assert decode["positions"] == ((1,), (1,), (1,))


def test_a_device_decoder_extends_a_cache_of_fixed_capacity(loaded):
    (profile,) = planned(loaded, max_tokens=100, context=300)["decoder"].profiles
    layers = loaded.manifest.decoder.layers
    assert len(profile) == 2 + 2 * layers  # and no weights
    assert [shape[0] for shape in profile["embeddings"]][::2] == [1, 100]
    assert {shape[1] for shape in profile[f"past_value.{layers - 1}"]} == {300}
    assert profile["last_position"] == ((1,), (1,), (1,))


def test_device_graphs_are_built_where_there_are_plugins_for_them(loaded):
    def forms(*arguments, **options):
        return {graph: one.spec.form for graph, one in planned(loaded, *arguments, **options).items()}

    everywhere = dict.fromkeys(("vision", "embed", "decoder"), "device")
    assert forms() == forms(form="device") == {**everywhere, "prune": "portable"}
    portable = dict.fromkeys(everywhere, "portable")
    assert forms(form="portable") == {**portable, "prune": "portable"}
    assert forms(replace(H200, plugin=None), tuple(everywhere)) == portable
    with pytest.raises(TangoError, match=r"plugins.*not built for TensorRT 8\.6\.0") as error:
        forms(replace(H200, plugin=None), ["vision"], form="device")
    assert "--form portable" in error.value.hint


def test_a_graph_that_has_no_device_form_is_built_in_its_portable_one(loaded):
    bundle = quantized(loaded, "int8", "onnxruntime", "tensorrt")
    found = planned(bundle)
    assert (found["decoder"].spec.form, found["embed"].spec.form) == ("portable", "device")
    with pytest.raises(TangoError, match=r"decoder graph .* has no device form"):
        planned(bundle, form="device")


def test_an_engine_of_a_device_graph_serves_other_weights(loaded):
    """Those of a fine-tune, whose graph is the same."""
    made = put_all(loaded)
    other = changed(loaded, "decoder.onnx.data")
    assert find(other, "decoder", H200).path == made["decoder"].path
    assert planned(other)["decoder"].key == made["decoder"].key
    assert set(made["decoder"].spec.files) == {"decoder.device.onnx"}


def test_by_default_a_pruned_prompt_fits_in_one_pass(loaded):
    from tango_plugins import op

    manifest = loaded.manifest
    most = planned(loaded, max_frames=64)["decoder"].profiles[PREFILL]["embeddings"][2][0]
    assert most >= op.capacity(64, manifest.video.tokens_per_frame, manifest.params) + 128


def test_frames_of_the_profiles(loaded):
    found = planned(loaded, min_frames=2, opt_frames=3, max_frames=7)
    for graph, tensor in (("vision", "frames"), ("prune", "timestamps")):
        assert [shape[0] for shape in found[graph].profiles[0][tensor]] == [2, 3, 7]


def test_a_sidecar_reads_back_as_it_was_written(loaded):
    from tango_runtime.engines import read_sidecar

    for one in planned(loaded).values():
        put(one)
        assert read_sidecar(one.path.with_suffix(".json")).spec == one.spec
        assert one.path.name == f"{one.graph}-{one.key}.engine"


@pytest.mark.parametrize(
    ("machine", "options", "changed"),
    [
        (replace(H200, plugin="2"), {"form": "portable"}, {"prune"}),
        (replace(H200, plugin="2"), {"form": "device"}, {"vision", "prune", "embed", "decoder"}),
        (replace(H200, gpu="NVIDIA H100"), {}, set()),
        (replace(H200, tensorrt="8.6.1"), {}, {"vision", "prune", "embed", "decoder"}),
        (replace(H200, compute_capability="8.9"), {}, {"vision", "prune", "embed", "decoder"}),
        (H200, {"retention_ratio": 0.2, "max_tokens": 256, "context": 512}, {"prune"}),
        (H200, {"max_frames": 99, "max_tokens": 256, "context": 512}, {"vision", "prune"}),
        (H200, {"max_tokens": 256, "context": 500}, {"decoder"}),
        (H200, {"max_tokens": 250, "context": 512}, {"embed", "decoder"}),
        (H200, {"workspace": 64, "max_tokens": 256, "context": 512}, {"vision", "prune", "embed", "decoder"}),
    ],
)
def test_a_key_depends_on_what_the_engine_depends_on_and_nothing_else(loaded, machine, options, changed):
    given = {"max_tokens": 256, "context": 512, "opt_frames": 3, "max_frames": 3}
    before = planned(loaded, **given, form=options.get("form"))
    after = planned(loaded, machine, **given | options)
    assert {graph for graph in before if before[graph].key != after[graph].key} == changed


def changed(bundle, name):
    """The bundle with another file of that name."""
    file = replace(bundle.manifest.files[name], sha256="0" * 64)
    return replace(bundle, manifest=replace(bundle.manifest, files={**bundle.manifest.files, name: file}))


@pytest.mark.parametrize(("form", "file"), [("portable", "vision.onnx.data"), ("device", "vision.device.onnx")])
def test_another_graph_has_another_key(loaded, form, file):
    before, after = planned(loaded, form=form), planned(changed(loaded, file), form=form)
    assert {graph for graph in before if before[graph].key != after[graph].key} == {"vision"}


def test_precision_is_the_graphs_own(loaded):
    assert set(planned(loaded)["decoder"].flags) == {"EXPLICIT_BATCH", "FP16", "OBEY_PRECISION_CONSTRAINTS"}
    assert planned(loaded, ORIN)["decoder"].flags == ("STRONGLY_TYPED",)
    single = replace(loaded, manifest=replace(loaded.manifest, dtype="float32"))
    assert planned(single)["decoder"].flags == ("EXPLICIT_BATCH",)
    assert planned(loaded, ORIN, strip_weights=True)["prune"].flags == ("STRONGLY_TYPED",)


def quantized(loaded, precision, *engines):
    quantization = Quantization(precision, 0, ())
    graph = replace(loaded.manifest.graphs["decoder"], quantization=quantization, runtimes=engines)
    return replace(loaded, manifest=replace(loaded.manifest, graphs={**loaded.manifest.graphs, "decoder": graph}))


def test_an_int8_graph_asks_an_old_tensorrt_for_int8(loaded):
    bundle = quantized(loaded, "int8", "onnxruntime", "tensorrt")
    assert "INT8" in planned(bundle)["decoder"].flags
    assert "INT8" not in planned(bundle)["vision"].flags
    assert planned(bundle, ORIN)["decoder"].flags == ("STRONGLY_TYPED",)


def test_a_graph_that_is_not_for_tensorrt_is_rejected(loaded):
    with pytest.raises(TangoError, match=r"decoder graph.*for onnxruntime"):
        planned(quantized(loaded, "int4", "onnxruntime"))


def test_fp8_needs_tensorrt_10(loaded):
    bundle = quantized(loaded, "fp8", "tensorrt")
    with pytest.raises(TangoError, match=r"needs TensorRT 10; this is 8\.6"):
        planned(bundle)
    assert planned(bundle, replace(ORIN, compute_capability="11.0"))["decoder"].flags == ("STRONGLY_TYPED",)


def test_fp8_needs_a_gpu_that_has_it(loaded):
    with pytest.raises(TangoError, match=r"decoder of .*fp8 needs a GPU of compute capability 8\.9 or later.*has 8\.7"):
        planned(quantized(loaded, "fp8", "tensorrt"), ORIN)


@pytest.mark.parametrize(
    ("has_device", "message"),
    [
        (True, r"ONNX Runtime runs the decoder graph of .* on a GPU only"),
        (False, r"ONNX Runtime cannot run the decoder graph of .*: it is for tensorrt"),
    ],
)
def test_onnxruntime_on_a_cpu_runs_no_fp8(loaded, has_device, message):
    bundle = quantized(loaded, "fp8", "tensorrt")
    graph = bundle.manifest.graphs["decoder"]
    graph = replace(graph, device=replace(graph, runtimes=("onnxruntime",)) if has_device else None)
    bundle = replace(bundle, manifest=replace(bundle.manifest, graphs={**bundle.manifest.graphs, "decoder": graph}))
    with pytest.raises(TangoError, match=message):
        check_runtime(bundle, "decoder")


@pytest.mark.parametrize(
    ("machine", "options", "named"),
    [
        (H200, {"min_frames": 0}, "frames"),
        (H200, {"min_frames": 5, "max_frames": 4}, "frames"),
        (H200, {"max_frames": 257}, "--max-frames"),
        (H200, {"max_tokens": 10**6}, "--max-tokens"),
        (H200, {"context": 0}, "--context"),
        (H200, {"optimization_level": 6}, "--builder-optimization-level"),
        (H200, {"workspace": 0}, "--workspace"),
        (H200, {"strip_weights": True}, "--strip-weights"),
        (H200, {"hardware_compatibility": "sameComputeCapability"}, "sameComputeCapability"),
        (replace(H200, tensorrt="8.5.3"), {"version_compatible": True}, "--version-compatible"),
        (replace(H200, tensorrt="8.5.3"), {"optimization_level": 1}, "--builder-optimization-level"),
        (replace(H200, compute_capability="7.5"), {"hardware_compatibility": "ampere+"}, "7.5"),
        (replace(H200, plugin=None), {}, "plugin"),
        (H200, {"retention_ratio": 1.5}, "retention_ratio"),
    ],
)
def test_options_that_cannot_be_built_are_rejected_by_name(loaded, machine, options, named):
    with pytest.raises(TangoError, match=named):
        planned(loaded, machine, **options)


def test_an_engine_that_fits_is_found(loaded):
    made = put_all(loaded)
    for graph, one in made.items():
        found = find(loaded, graph, H200, verify=True)
        assert (found.path, found.profiles, found.warning) == (one.path, one.profiles, None)


def test_a_missing_engine_names_the_command(loaded):
    error = find_error(loaded, "decoder")
    assert f"tango build '{loaded.path}' --graphs decoder" in error.hint


@pytest.mark.parametrize(
    ("machine", "here", "there"),
    [
        (replace(H200, tensorrt="8.6.1"), "8.6.1", "8.6.0"),
        (replace(H200, compute_capability="8.7", gpu="Orin"), "8.7", "9.0"),
        (replace(H200, plugin="2"), "interface 2", "interface 1"),
        (replace(H200, plugin=None), "tango plugin build", "interface 1"),
    ],
)
def test_another_machine_is_rejected_and_both_sides_named(loaded, machine, here, there):
    put_all(loaded)
    error = find_error(loaded, "prune", machine)
    assert here in error.message
    assert there in error.message
    assert "tango build" in error.hint


def test_another_ratio_is_rejected_with_the_command_that_builds_it(loaded):
    put_all(loaded)
    error = find_error(loaded, "prune", H200, loaded.manifest.params.at(0.25))
    assert "retention_ratio 1000" in error.message
    assert "2500" in error.message
    assert error.hint.endswith("--graphs prune --retention-ratio 0.25")
    put_all(loaded, retention_ratio=0.25)
    assert find(loaded, "prune", H200, loaded.manifest.params.at(0.25))
    assert find(loaded, "prune", H200)  # the first still exists


def test_another_graph_is_rejected(loaded):
    put_all(loaded)
    other = changed(loaded, "decoder.device.onnx")
    assert "another graph" in find_error(other, "decoder").message
    assert find(other, "vision", H200)


def test_a_truncated_missing_or_changed_engine_is_rejected(loaded):
    made = put_all(loaded)
    made["vision"].path.write_bytes(b"cut")
    assert "3 bytes" in find_error(loaded, "vision").message
    made["embed"].path.unlink()
    assert "0 bytes" in find_error(loaded, "embed").message
    made["decoder"].path.write_bytes(b"enginE")
    assert "SHA-256" in find_error(loaded, "decoder", verify=True).message


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', '{"format": 3}', '{"format": 3, "spec": 3}'])
def test_a_damaged_sidecar_is_rejected(loaded, content):
    made = put_all(loaded)
    file = made["vision"].path.with_suffix(".json")
    file.write_text(content)
    error = find_error(loaded, "vision")
    assert file.name in error.message
    assert "rm " in error.hint


def test_the_newest_engine_that_fits_is_used(loaded):
    made = [put(planned(loaded, max_frames=n)["vision"]) for n in (4, 8, 6)]
    other = put(planned(loaded, replace(H200, tensorrt="8.6.1"))["vision"])
    for age, one in enumerate([*made, other]):
        os.utime(one.path.with_suffix(".json"), (age, age))
    assert find(loaded, "vision", H200).path == made[-1].path


@pytest.mark.parametrize(
    ("here", "fits"), [("8.6.0", True), ("8.6.1", True), ("10.3.0", True), ("11.1.0", False), ("8.5.3", False)]
)
def test_a_version_compatible_engine_runs_in_later_versions(loaded, here, fits):
    put(planned(loaded, version_compatible=True)["vision"])
    if fits:
        assert find(loaded, "vision", replace(H200, tensorrt=here)).version_compatible
    else:
        assert here in find_error(loaded, "vision", replace(H200, tensorrt=here)).message


def test_an_ampere_plus_engine_runs_on_later_gpus(loaded):
    put(planned(loaded, hardware_compatibility="ampere+")["vision"])
    assert find(loaded, "vision", replace(H200, compute_capability="8.7", gpu="Orin")).warning is None
    assert "8.0+" in find_error(loaded, "vision", replace(H200, compute_capability="7.5")).message


def test_another_gpu_of_the_same_kind_is_a_warning(loaded):
    put_all(loaded)
    assert "H100" in find(loaded, "vision", replace(H200, gpu="NVIDIA H100")).warning


def test_shapes_outside_a_profile_name_axis_bound_and_flag(loaded):
    put_all(loaded, max_frames=4, max_tokens=100, context=300, form="portable")
    vision, decoder = find(loaded, "vision", H200), find(loaded, "decoder", H200)
    assert (decoder.max_size("N"), decoder.max_size("P", DECODE), decoder.min_size("P")) == (100, 300, 0)
    size = loaded.manifest.video.size[0]
    vision.check({"frames": (4, size, size, 3)})
    with pytest.raises(TangoError, match=r"5 frames.*1 to 4") as error:
        vision.check({"frames": (5, size, size, 3)})
    assert "--max-frames" in error.value.hint
    shapes = {name: list(ranges[2]) for name, ranges in decoder.profiles[DECODE].items()}
    decoder.check(shapes, DECODE)
    shapes["past_key.0"][1] = 301
    with pytest.raises(TangoError, match="301 cached positions") as error:
        decoder.check(shapes, DECODE)
    assert "--context" in error.value.hint


def test_estimates_grow_with_what_they_depend_on(loaded):
    few, many = planned(loaded, max_frames=4), planned(loaded, max_frames=64)
    assert few["vision"].memory.activations < many["vision"].memory.activations
    short, long = (planned(loaded, max_tokens=64, context=n)["decoder"].memory for n in (128, 1024))
    decoder = loaded.manifest.decoder
    assert long.cache == 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * 1024 * 2
    assert short.activations == long.activations  # a device graph stores no scores
    files = loaded.manifest.files
    assert long.weights == long.file + files["decoder.onnx.data"].size
    assert long.file == files["decoder.device.onnx"].size
    portable = planned(loaded, form="portable")["decoder"].memory
    assert portable.weights == portable.file == files["decoder.onnx"].size + files["decoder.onnx.data"].size
    assert portable.activations < planned(loaded, form="portable", context=1024)["decoder"].memory.activations


@pytest.mark.parametrize(
    ("version", "form", "graph", "weights", "measured"),
    [
        ("8.6.0", "device", "vision", 0.80e9, 4.54e9),
        ("8.6.0", "device", "embed", 0.27e9, 4.40e9),
        ("8.6.0", "portable", "vision", 0.80e9, 11.26e9),
        ("11.0.0", "portable", "vision", 0.80e9, 3.11e9),
        ("11.0.0", "portable", "embed", 0.27e9, 1.15e9),
        ("11.0.0", "portable", "decoder", 0.99e9, 5.11e9),
    ],
)
def test_a_build_takes_no_more_host_memory_than_estimated(loaded, version, form, graph, weights, measured):
    """Peak resident sets of the 0.5B's builds on an H200, with TensorRT-RTX 1.6.1 in the place of 11."""
    data = loaded.manifest.graphs[graph].data
    files = loaded.manifest.files | {data: FileSpec(int(weights), "0" * 64)}
    bundle = replace(loaded, manifest=replace(loaded.manifest, files=files))
    machine = replace(H200, tensorrt=version)
    assert measured <= planned(bundle, machine, [graph], form=form)[graph].memory.build_host <= 2.2 * measured
