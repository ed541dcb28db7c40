"""The stages on a GPU, with the GPU's memory and kernels emulated on the host: the same answers as the CPU's stages.

The engine is ONNX Runtime's on the CPU, bound to that memory exactly as the CUDA provider is, or TensorRT with that in
its place. tests/gpu/runtime runs the same on a GPU.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import threading
import weakref
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tango_plugins import TangoError, op
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda import backend as cuda
from tango_runtime.backends.cuda import device, logits
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import HostPool, Pool, Stream
from tango_runtime.backends.cuda.logits import DeviceLogits
from tango_runtime.backends.cuda.ort_runner import OrtRunner
from tango_runtime.bundle import Bundle
from tango_runtime.video.preprocess import resize
from tests.fakes.cuda import HostPruner, array, install
from tests.fakes.sequence import OneSequence
from tests.fakes.tensorrt_engines import HostTensorRT, build, open_backend

QUESTION = "What happens in the video?"


@pytest.fixture
def host(monkeypatch):
    """CUDA, emulated."""
    return install(monkeypatch)


@pytest.fixture(scope="module")
def built(tiny_bundle, tmp_path_factory):
    """A copy of the bundle, with engines for up to 8 frames, 100 tokens a pass and 600 positions."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "bundle")
    build(folder, max_frames=8, max_tokens=100, context=600)
    return folder


@pytest.fixture
def make(host, tiny_bundle, built, monkeypatch):
    """``make("onnxruntime")`` or ``make("tensorrt")``: a chain whose stages are the GPU's, with limits as given."""
    import onnxruntime

    def made(engine="onnxruntime", folder=None, **limits):
        llm = VideoLLM(folder or (built if engine == "tensorrt" else tiny_bundle), "ort-cpu")
        if engine == "tensorrt":
            llm._backend = open_backend(llm.bundle, host, monkeypatch)
            return llm
        stream = Stream()
        graphs = OrtRunner(onnxruntime, llm.bundle, stream, ("CPUExecutionProvider", "cpu"))
        for name, value in limits.items():
            setattr(graphs, name, value)
        llm._backend = CudaBackend(llm.bundle, graphs, stream)
        return llm

    return made


def same(found, wanted):
    assert found.ids == wanted.ids
    for name in ("indices", "merged", "segments", "kept", "prompt_tokens", "finish"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_allclose(found.salience, wanted.salience, atol=1e-6)


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize(
    ("engine", "limits"),
    [
        ("onnxruntime", {}),
        ("onnxruntime", {"tokens_at_once": 16, "steps_at_once": 3}),
        ("onnxruntime", {"tokens_at_once": 7}),
        ("tensorrt", {}),
    ],
)
def test_the_answer_is_the_cpus(make, llm, colors, engine, limits, prune):
    options = {"frames": 8, "prune": prune, "max_new_tokens": 24}
    same(make(engine, **limits).generate(colors, QUESTION, **options), llm.generate(colors, QUESTION, **options))


def test_sampling_by_chance_draws_the_same(make, llm, colors):
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "max_new_tokens": 16}
    same(make().generate(colors, QUESTION, **options), llm.generate(colors, QUESTION, **options))


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_an_answer_by_a_schema_is_the_cpus(make, llm, colors, engine):
    """Its logits are masked on the host: all of them are copied, for such an answer alone."""
    pytest.importorskip("llguidance", reason="answers that follow a JSON schema need llguidance")
    schema = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 4}
    wanted = llm.generate(colors, QUESTION, json_schema=schema, max_new_tokens=24)
    found = make(engine).generate(colors, QUESTION, json_schema=schema, max_new_tokens=24)
    same(found, wanted)
    assert found.text.startswith("[")


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 2500])
def test_a_file_is_copied_in_pieces(host, tmp_path, monkeypatch, size):
    monkeypatch.setattr(device, "_CHUNK_BYTES", 1000)
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "data").write_bytes(data)
    given_up = threading.Event()
    buffer = device.upload_file(tmp_path / "data", given_up)
    assert array(buffer.view((size,), np.uint8)).tobytes() == data
    given_up.set()
    copied, host.cudaMemcpy = [], lambda *arguments: copied.append(arguments)
    device.upload_file(tmp_path / "data", given_up)
    assert not copied


def test_half_precision_too(make, responsive_checkpoint, colors):
    _, folder = responsive_checkpoint(dtype="fp16")
    same(
        make(folder=folder).generate(colors, QUESTION, max_new_tokens=12),
        VideoLLM(folder, "ort-cpu").generate(colors, QUESTION, max_new_tokens=12),
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("options", [{}, {"retention_ratio": 0.5}, {"prune": False}])
def test_rows_of_llava_video_have_their_ends(make, responsive_checkpoint, colors, dtype, options):
    _, folder = responsive_checkpoint("llava-video", image=126, dtype=dtype)
    options = {"frames": 8, "max_new_tokens": 12, **options}
    found, wanted = (llm.generate(colors, QUESTION, **options) for llm in (make(folder=folder), VideoLLM(folder)))
    same(found, wanted)
    assert found.rows == wanted.rows > found.kept


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_sessions_take_turns_as_if_each_question_were_asked_anew(make, colors, engine):
    llm = make(engine)
    videos, questions = (colors, colors[::-1]), [QUESTION, "Who?", "What happens here?", QUESTION]
    alone = [[llm.generate(video, each, max_new_tokens=8).ids for video in videos] for each in questions]
    sessions = [llm.session(video) for video in videos]
    for question, wanted in zip(questions, alone, strict=True):
        assert [session.ask(question, max_new_tokens=8).ids for session in sessions] == wanted
    streams = [session.stream(questions[1], max_new_tokens=8) for session in sessions]
    for pieces in zip_longest(*streams):
        assert pieces
    assert [stream.answer.ids for stream in streams] == alone[1]


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_text_follows_text_and_is_rewound(make, llm, engine):
    """As an evaluation asks: embeddings from the host, several questions behind one prefill."""
    ids, rng = np.arange(20, 29), np.random.default_rng(0)
    tokens = rng.standard_normal((30, llm.bundle.manifest.decoder.hidden_size)).astype(np.float32)
    for stages in (on_gpu := OneSequence(make(engine)._backend)), OneSequence(llm._backend):
        stages.prefill([stages.embed(ids), tokens, stages.embed(ids[:1])], 64)
        heard = []
        for question in (ids[:5], ids[3:4]):
            stages.rewind(40)
            heard.append(np.array(stages.extend(stages.embed(question))))
            heard += [np.array(stages.decode(token)) for token in (5, 9)]
        if stages is on_gpu:
            found = heard
    np.testing.assert_allclose(found, heard, atol=1e-4)
    np.testing.assert_allclose(on_gpu.to_host(on_gpu.embed(ids)), llm._backend.embed(ids))


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_only_frames_words_and_what_is_asked_for_cross(make, colors, engine):
    llm = make(engine)
    traffic, manifest = llm._backend.traffic, llm.bundle.manifest
    word = manifest.decoder.hidden_size * np.dtype(manifest.dtype).itemsize
    for budget, counts in (("paper", 1), ("exact", 0)):
        manifest.prune["budget"] = budget
        uploads, uploaded, downloads, downloaded = vars(traffic).values()
        stream = llm.stream(colors, QUESTION, frames=8, max_new_tokens=6)
        for _ in stream:
            pass
        answer, said = stream.answer, len(stream.answer.ids)
        text = answer.prompt_tokens - answer.kept
        up = answer.frames.nbytes + answer.seconds.nbytes + word * (text + said - 1)
        assert traffic.uploaded - uploaded == up
        assert traffic.uploads - uploads == 2 + 2 + said - 1
        trace = 4 * capacity(llm, 8) + capacity(llm, 8) + 8 * 8 + answer.salience.nbytes
        assert traffic.downloaded - downloaded == 4 * counts + 8 * said + trace
        assert traffic.downloads - downloads == counts + said + 4


def capacity(llm, frames):
    return op.capacity(frames, llm.bundle.manifest.video.tokens_per_frame, llm.bundle.manifest.params)


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_memory_grows_to_a_peak_and_no_further(make, host, colors, engine):
    llm, held, locks = make(engine), [], []
    for _ in range(3):
        for frames, ratio, new in ((8, 1.0, 40), (2, 0.1, 3), (5, 0.5, 20), (3, 0.9, 9), (8, 0.3, 40)):
            llm.generate(colors, QUESTION, frames=frames, retention_ratio=ratio, max_new_tokens=new)
        held.append((host.allocations, host.held()))
        locks.append(host.locks)
    assert held[0] == held[1] == held[2]
    assert locks[1] == locks[2]  # two take turns, since the pipeline holds its latest answer; both are large by now


def test_host_memory_is_used_again_when_nothing_needs_it(host):
    pool, host_pool, stream = Pool(), HostPool(), Stream()
    own, to = set(host.locked), pool.take("frames", (100,), np.uint8)
    first = host_pool.take((100,), np.uint8)
    first[:] = 7
    stream.upload(first, to)
    kept, address = first[50:], first.ctypes.data
    del first
    stream.synchronize()
    second = host_pool.take((100,), np.uint8)  # a view still refers to the first
    second[:] = 8
    assert (kept == 7).all()
    stream.upload(second, to)
    del kept, second
    third = host_pool.take((10,), np.uint8)  # the second is still being read
    assert third.ctypes.data == address
    larger = host_pool.take((200,), np.uint8)
    stream.synchronize()
    del third, larger, host_pool
    assert set(host.locked) == own


def test_host_memory_that_many_held_is_given_back(host):
    pool = HostPool()
    held = [pool.take((100,), np.uint8) for _ in range(50)]
    assert len(host.locked) == 50
    held.clear()
    assert len(host.locked) == 4


def test_answers_that_fail_leave_no_frames_behind(make, host, colors):
    llm = make("tensorrt")
    for _ in range(50):
        with pytest.raises(TangoError, match="positions, the decoder's engine holds 600"):
            llm.generate(colors, QUESTION, prune=False, max_new_tokens=600)
    assert len(host.locked) < 30


def test_memory_that_cannot_be_locked_is_told(host):
    host.cudaMallocHost = lambda size: (host.cudaError_t.cudaErrorMemoryAllocation, 0)
    with pytest.raises(TangoError, match=r"no 14\.\d MB of memory left that can be locked"):
        HostPool().take((32, 384, 384, 3), np.uint8)


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_answers_keep_their_frames(make, host, colors, frames, engine):
    llm = make(engine)
    first, second = (llm.generate(clip, QUESTION, frames=8, max_new_tokens=2) for clip in (colors, frames))
    for answer, clip in ((first, colors), (second, frames)):
        np.testing.assert_array_equal(answer.frames, [resize(frame, (112, 112)) for frame in clip])
    assert sum(len(block) == first.frames.nbytes for block in host.locked.values()) == 2


@pytest.mark.parametrize(("budget", "waits"), [("paper", 1), ("exact", 0)])
def test_nothing_waits_but_for_the_count_of_the_kept(make, host, colors, monkeypatch, budget, waits):
    llm = make()
    llm.bundle.manifest.prune["budget"] = budget
    llm.generate(colors, QUESTION, frames=8, max_new_tokens=1)
    events, synchronize, argmax = [], host.cudaStreamSynchronize, DeviceLogits.argmax
    monkeypatch.setattr(host, "cudaStreamSynchronize", lambda stream: (events.append("wait"), synchronize(stream))[1])
    monkeypatch.setattr(DeviceLogits, "argmax", lambda logits: (events.append("token"), argmax(logits))[1])
    llm.generate(colors, QUESTION, frames=8, max_new_tokens=1)
    assert events[: events.index("token")].count("wait") == waits


def test_what_an_overflow_left_in_the_cache_is_forgotten(make, frames):
    llm = make()
    wanted = llm.generate(frames, QUESTION, max_new_tokens=8).ids
    overflow(llm._backend)
    assert llm.generate(frames, QUESTION, max_new_tokens=8).ids == wanted


def overflow(backend):
    """NaN in every row that the latest answer wrote into its cache, which waits for the next sequence."""
    (cache,) = backend._decoder._free
    shape = (len(cache._cached), cache._slab, cache.capacity, cache._head_dim)
    memory = cache._buffer.view(shape, cache._dtype)
    rows = np.array(array(memory))
    rows[:, :, : cache._reached] = np.nan
    backend._stream.upload(rows, memory)


def test_another_cache_in_the_same_memory_is_empty(make, frames):
    llm = make()
    wanted = llm.generate(frames, QUESTION, max_new_tokens=8).ids
    llm.generate(frames, QUESTION, max_new_tokens=600)
    overflow(llm._backend)
    assert llm.generate(frames, QUESTION, max_new_tokens=8).ids == wanted


def test_after_a_pass_that_failed_the_sequence_is_as_long_as_before(make, monkeypatch):
    stages, ids = OneSequence(make()._backend), np.arange(20, 29)
    stages.prefill([stages.embed(ids)], 64)
    wanted = np.array(stages.extend(stages.embed(ids[:3])))
    stages.rewind(len(ids))
    bind = stages._graphs.bind

    def failing(graph, tensors, **options):
        if graph == "decoder":
            raise TangoError("the engine failed", "")
        return bind(graph, tensors, **options)

    monkeypatch.setattr(stages._graphs, "bind", failing)
    with pytest.raises(TangoError, match="the engine failed"):
        stages.extend(stages.embed(ids))
    monkeypatch.setattr(stages._graphs, "bind", bind)
    np.testing.assert_array_equal(np.array(stages.extend(stages.embed(ids[:3]))), wanted)


def test_after_a_cache_that_had_no_room_a_smaller_one_has(make, host):
    stages, ids = OneSequence(make()._backend), np.arange(20, 29)
    wanted = np.array(stages.prefill([stages.embed(ids)], 64))
    everything, host.memory = host.memory, host.held() + 1000
    with pytest.raises(TangoError, match="MB left"):
        stages.prefill([stages.embed(ids)], 2000)
    host.memory = everything
    np.testing.assert_array_equal(np.array(stages.prefill([stages.embed(ids)], 64)), wanted)


def test_a_file_goes_up_whole_or_not_at_all(host, tmp_path, monkeypatch):
    file, size = tmp_path / "data", 3 * (1 << 22) + 77
    data = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    file.write_bytes(data.tobytes())
    buffer = device.upload_file(file, threading.Event())
    np.testing.assert_array_equal(array(buffer.view((size,), np.uint8)), data)
    found = SimpleNamespace(st_size=size + 5)
    monkeypatch.setattr(Path, "stat", lambda self, **options: found)
    with pytest.raises(TangoError, match="became shorter while it was read"):
        device.upload_file(file, threading.Event())


def test_readers_end_where_one_fails(host, tmp_path, monkeypatch):
    file, copied = tmp_path / "data", []
    file.write_bytes(bytes(40 << 22))
    locked = device.PinnedBlock

    def failing(size):
        if not copied:
            copied.append("failed")
            raise TangoError("the host has no memory left", "")
        return locked(size)

    monkeypatch.setattr(device, "PinnedBlock", failing)
    copy = host.cudaMemcpy
    monkeypatch.setattr(host, "cudaMemcpy", lambda *call: copied.append("piece") or copy(*call))
    with pytest.raises(TangoError, match="no memory left"):
        device.upload_file(file, threading.Event())
    assert copied.count("piece") < 40


def test_a_full_gpu_is_told(host):
    host.memory = 1000
    with pytest.raises(TangoError, match="the GPU has 0 of 0 MB left"):
        Pool().take("cache", (1 << 20,), np.uint8)


def test_more_than_the_cache_holds_is_refused(make, llm):
    stages = OneSequence(make()._backend)
    ids = np.arange(20)
    stages.prefill([stages.embed(ids)], 64)
    with pytest.raises(TangoError, match=r"20 \+ 2029 tokens do not fit into the bundle's context of 2048"):
        stages.extend(stages.embed(np.zeros(2029, np.int64)))
    stages.extend(stages.embed(np.zeros(500, np.int64)))
    stages._graphs.capacity = 256
    with pytest.raises(TangoError, match="may take 300 positions, the decoder's engine holds 256"):
        stages.prefill([stages.embed(ids)], 300)


def test_embeddings_of_another_width_are_refused(make):
    stages = OneSequence(make()._backend)
    with pytest.raises(TangoError, match=r"a tensor is \[4, 7\], wanted is \[4, "):
        stages.prefill([np.zeros((4, 7))], 64)


def test_a_logit_that_is_not_finite_is_noticed_on_the_device(host):
    from tango_runtime.pipeline.sampling import Sampler

    pool, stream = Pool(), Stream()
    row = pool.take("logits", (5,), np.float32)
    stream.upload(np.array([1, np.nan, 3, 0, 0]), row)
    found = logits.DeviceLogits(row, logits.Greatest(stream), stream)
    with pytest.raises(TangoError, match="the logit of token 1 is nan"):
        Sampler()(found)


def test_a_pruner_is_made_once_for_each_shape_and_ratio(make, colors, monkeypatch):
    made = []
    monkeypatch.setattr(cuda, "CudaPruner", lambda *given: (made.append(given), HostPruner(*given))[1])
    llm = make()
    for frames, ratio in ((8, 0.5), (4, 0.5), (8, 0.25), (8, 0.5), (4, 0.5)):
        llm.generate(colors, QUESTION, frames=frames, retention_ratio=ratio, max_new_tokens=1)
    assert [(frames, params.retention_ratio) for params, frames, *_ in made] == [(8, 0.5), (4, 0.5), (8, 0.25)]


def test_decoding_replays_a_recording(make, colors, monkeypatch):
    llm = make("tensorrt")
    trt = llm._backend._graphs._trt
    for _ in range(2):
        llm.generate(colors, QUESTION, max_new_tokens=9)
    assert trt.replays == 16


def test_shapes_outside_the_engines_are_refused_by_name(make, colors):
    llm = make("tensorrt")
    with pytest.raises(TangoError, match=r"frames has 9 frames, vision-.* was built for 1 to 8"):
        llm.generate(np.tile(colors, (2, 1, 1, 1)), QUESTION, frames=9)
    with pytest.raises(TangoError, match="positions, the decoder's engine holds 600"):
        llm.generate(colors, QUESTION, max_new_tokens=600)


def test_engines_that_cannot_be_used_are_refused(make, built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "bundle")
    engine = next((folder / "engines").glob("decoder-*.engine"))
    engine.write_bytes(b"x" * engine.stat().st_size)
    with pytest.raises(TangoError, match=r"TensorRT cannot load .*decoder-.*: magic tag does not match") as refused:
        make("tensorrt", folder)
    assert "tango build" in refused.value.hint
    engine.unlink()
    with pytest.raises(TangoError, match=r"decoder-.* has 0 bytes"):
        make("tensorrt", folder)


def test_engines_that_fail_later_find_the_first_logger(built, host, monkeypatch, tmp_path):
    folder = shutil.copytree(built, tmp_path / "bundle")
    bundle = Bundle.load(folder)
    trt = HostTensorRT(bundle, host)
    assert "TensorRT" in open_backend(bundle, host, monkeypatch, trt).description
    gc.collect()
    engine = next((folder / "engines").glob("decoder-*.engine"))
    engine.write_bytes(b"x" * engine.stat().st_size)
    with pytest.raises(TangoError, match="magic tag does not match"):
        open_backend(bundle, host, monkeypatch, trt)


def test_graphs_are_loaded_side_by_side(host, tiny_bundle):
    import onnxruntime

    together = threading.Barrier(2, timeout=600)

    class Session(onnxruntime.InferenceSession):
        def __init__(self, *arguments, **options):
            together.wait()
            super().__init__(*arguments, **options)

    module = SimpleNamespace(**{**vars(onnxruntime), "InferenceSession": Session})
    OrtRunner(module, Bundle.load(tiny_bundle), Stream(), ("CPUExecutionProvider", "cpu"))


def test_a_graph_has_no_block_of_memory_beside_those_of_its_first_run(host, tiny_bundle):
    import onnxruntime

    planned = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, file, options, **more):
            planned.append(options.enable_mem_pattern)
            super().__init__(file, options, **more)

    module = SimpleNamespace(**{**vars(onnxruntime), "InferenceSession": Session})
    OrtRunner(module, Bundle.load(tiny_bundle), Stream(), ("CPUExecutionProvider", "cpu"))
    assert planned == [False] * 2


@pytest.mark.parametrize("broken", [["decoder", "vision"], ["vision"]])
def test_of_graphs_that_cannot_be_loaded_one_is_told_and_always_the_same(host, tiny_bundle, tmp_path, broken):
    import onnxruntime

    bundle = Bundle.load(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    for graph in broken:
        bundle.graph(graph).write_bytes(b"garbage")
    with pytest.raises(TangoError, match=rf"ONNX Runtime cannot load .*{broken[0]}\.onnx on the GPU"):
        OrtRunner(onnxruntime, bundle, Stream(), ("CPUExecutionProvider", "cpu"))


def test_ctrl_c_ends_loading_whatever_else_fails(host, tiny_bundle, tmp_path):
    import onnxruntime

    bundle = Bundle.load(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    bundle.graph("vision").write_bytes(b"garbage")

    class Session(onnxruntime.InferenceSession):
        def get_providers(self):
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return super().get_providers()

    module = SimpleNamespace(**{**vars(onnxruntime), "InferenceSession": Session})
    with pytest.raises(KeyboardInterrupt):
        OrtRunner(module, bundle, Stream(), ("CPUExecutionProvider", "cpu"))


def test_sessions_go_before_their_stream_whatever_holds_them(host, tiny_bundle):
    import onnxruntime

    gone = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            weakref.finalize(self._sess, gone.append, "session")  # bindings hold this one

    names = "SessionOptions", "RunOptions", "__version__"
    module = SimpleNamespace(**{n: getattr(onnxruntime, n) for n in names}, InferenceSession=Session)
    host.cudaStreamDestroy = lambda handle: gone.append("stream")
    for in_a_cycle in (False, True):
        bundle, stream = Bundle.load(tiny_bundle), Stream()
        stages = [
            OneSequence(CudaBackend(bundle, OrtRunner(module, bundle, stream, ("CPUExecutionProvider", "cpu")), stream))
        ]
        stages[0].prefill([stages[0].embed(np.arange(4))], 16)
        stages[0].decode(1)
        if in_a_cycle:  # as fixtures, frames and notebooks hold things: the garbage collector finalizes in any order
            stages.append(stages)
        del stages, stream
        gc.collect()
        assert gone == ["session"] * 2 + ["stream"]
        gone.clear()


def test_tensors_are_bound_once_an_answer(host, tiny_bundle, monkeypatch):
    import onnxruntime

    bound, waits, bind = Counter(), {}, OrtRunner.bind
    monkeypatch.setattr(OrtRunner, "bind", lambda *given, **how: (bound.update([given[1]]), bind(*given, **how))[1])

    class Session(onnxruntime.InferenceSession):
        def __init__(self, file, *arguments, **options):
            super().__init__(file, *arguments, **options)
            self.graph = Path(file).stem

        def run_with_iobinding(self, binding, options):
            waits[self.graph] = options.entries.get("disable_synchronize_execution_providers") != "1"
            super().run_with_iobinding(binding, options)

    class Options(onnxruntime.RunOptions):
        def __init__(self):
            super().__init__()
            self.entries = {}

        def add_run_config_entry(self, name, value):
            self.entries[name] = value

    names = {name: getattr(onnxruntime, name) for name in ("SessionOptions", "__version__")}
    module, bundle, stream = (
        SimpleNamespace(**names, InferenceSession=Session, RunOptions=Options),
        Bundle.load(tiny_bundle),
        Stream(),
    )
    stages = OneSequence(
        CudaBackend(bundle, OrtRunner(module, bundle, stream, ("CPUExecutionProvider", "cpu")), stream)
    )
    stages.vision(np.zeros((2, 112, 112, 3), np.uint8), lambda done: None)
    stages.prefill([stages.embed(np.arange(4))], 16)
    for token in range(9):
        stages.decode(token)
    assert bound == {"vision": 1, "decoder": 2}
    assert waits == {"vision": True, "decoder": True}


def test_what_a_stream_is_used_by_goes_when_the_process_ends_and_the_stream_stays():
    program = """
from tests.fakes.cuda import HostCuda
from tango_runtime.backends.cuda import device
host = HostCuda()
host.cudaStreamDestroy = lambda handle: print("stream")
device.cudart = lambda: host
stream = device.Stream()
stream.before_end(lambda: print("session"))
print("end")
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["end", "session"]


def test_frames_that_are_on_the_device_stay_there(make, llm, colors):
    backend, rng = make()._backend, np.random.default_rng(0)
    frames = rng.integers(0, 255, (3, 112, 112, 3), dtype=np.uint8)
    wanted = [np.array(backend.to_host(tensor)) for tensor in backend.vision(frames, lambda done: None)]
    pool, before = Pool(), backend.traffic.uploads
    there = pool.take("there", frames.shape, np.uint8)
    backend._stream.upload(frames, there)
    found = backend.vision(there, lambda done: None)
    assert backend.traffic.uploads == before + 1
    for tensor, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(backend.to_host(tensor), expected)
    with pytest.raises(TangoError, match="frames on a device were given to the CPU backend"):
        llm._backend.vision(there, lambda done: None)
