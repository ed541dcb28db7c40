"""Frames on their way to the vision graph of a GPU, whose memory and resize are emulated on the host."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_plugins.device_array import DeviceArray
from tango_plugins.resize import NV12, P010
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda import device
from tango_runtime.backends.cuda import frames as frames_module
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Pool, Stream
from tango_runtime.backends.cuda.frames import FrameLoader, GpuDecoder
from tango_runtime.backends.cuda.ort_runner import OrtRunner
from tango_runtime.video import decoding, file, open_source, sample, yuv
from tango_runtime.video.container import open_video
from tango_runtime.video.preprocess import preprocess, resize
from tango_runtime.video.rgb import Turn, turn_of
from tango_runtime.video.yuv import HardwareError, YuvFrame
from tests.fakes.cuda import array, install
from tests.runtime.video.clips import show, write

SIZE, QUESTION = (28, 20), "What happens in the video?"


class OnDevice:
    """An array in what stands for a GPU's memory, as libraries show one: by an interface of theirs."""

    def __init__(self, host, held, kind):
        self._host, self._held, self._kind = host, held, kind
        self.shape, self.dtype = held.shape, f"torch.{held.dtype}"
        host.blocks[held.ctypes.data] = (held, held.nbytes)
        if kind == "cuda_array_interface":
            self.__cuda_array_interface__ = held.__array_interface__

    def __len__(self):
        return len(self._held)

    def __getitem__(self, i):
        return OnDevice(self._host, self._held[i], self._kind)

    def clone(self):
        return OnDevice(self._host, self._held.copy(), self._kind)

    def __dlpack__(self):
        return self._held.__dlpack__()

    def __dlpack_device__(self):
        return (2, 0) if self._kind == "dlpack" else (1, 0)


@pytest.fixture
def host(monkeypatch):
    return install(monkeypatch)


@pytest.fixture
def stream(host):
    return Stream()


@pytest.fixture
def load(stream):
    return FrameLoader(stream, Pool(), nvdec=True)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("sizes", [[0], [0, 0], [0, 1, 1, 2], [0] * 19])
def test_large_frames_are_resized_on_the_device(load, stream, sizes):
    frames, count = [noise(60 + i, 90 - i, 3, seed=k) for k, i in enumerate(sizes)], len(sizes)
    batch = load([(float(i), frame) for i, frame in enumerate(frames)], count, SIZE)
    assert isinstance(batch.frames, DeviceArray)
    assert (batch.frames.shape, batch.aspect) == ((count, *SIZE, 3), 1.5)
    np.testing.assert_array_equal(array(batch.frames), [resize(frame, SIZE) for frame in frames])
    np.testing.assert_array_equal(batch.seconds, np.arange(count))
    assert (stream.traffic.uploaded, stream.traffic.downloads) == (sum(frame.nbytes for frame in frames), 0)


def test_few_frames_are_pinned_at_a_time(load, host):
    own = len(host.locked)
    for _ in range(3):
        load([(float(i), noise(60, 90, 3)) for i in range(48)], 48, SIZE)
    assert len(host.locked) - own == host.locks - own == frames_module._PARTS


def test_very_large_frames_come_one_by_one(load, monkeypatch):
    pinned, take = [], frames_module.HostPool.take

    def noted(pool, shape, dtype):
        pinned.append(math.prod(shape))
        return take(pool, shape, dtype)

    monkeypatch.setattr(frames_module.HostPool, "take", noted)
    monkeypatch.setattr(frames_module, "_PART_BYTES", 2 * 60 * 90 * 3)
    frames = [noise(*shape, 3, seed=i) for i, shape in enumerate([(60, 90)] * 3 + [(120, 180)] * 2)]
    batch = load([(float(i), frame) for i, frame in enumerate(frames)], 5, SIZE)
    np.testing.assert_array_equal(array(batch.frames), [resize(frame, SIZE) for frame in frames])
    assert pinned == [2 * 60 * 90 * 3, 60 * 90 * 3, 120 * 180 * 3, 120 * 180 * 3]


def test_frames_of_both_places(load, host):
    frames = noise(25, 60, 90, 3)
    mixed = [frame if i % 3 else OnDevice(host, frame, "dlpack") for i, frame in enumerate(frames)]
    batch = load(list(enumerate(mixed)), 25, SIZE)
    np.testing.assert_array_equal(array(batch.frames), [resize(frame, SIZE) for frame in frames])


def test_small_frames_stay_on_the_host(load, stream):
    frames = [(float(i), noise(30, 28, 3)) for i in range(3)]
    batch = load(frames, 3, SIZE)
    np.testing.assert_array_equal(batch.host_frames, preprocess(frames, SIZE).host_frames)
    assert stream.traffic.uploads == 0


@pytest.mark.parametrize("kind", ["cuda_array_interface", "dlpack"])
def test_frames_on_the_device_do_not_leave_it(load, host, stream, kind):
    frames = noise(12, 24, 32, 3)
    expected = [resize(frame, SIZE) for frame in frames[[0, 3, 7, 11]]]
    on_device = OnDevice(host, frames, kind)
    pairs = [(float(i), on_device[i]) for i in range(12)]
    assert open_source(on_device).frame_size == open_source(pairs).frame_size == (24, 32)
    for source in (on_device, pairs, iter(pairs)):
        batch = load(sample(source, 4), 4, SIZE)
        np.testing.assert_array_equal(array(batch.frames), expected)
        np.testing.assert_array_equal(batch.seconds, [0, 3, 7, 11])
    assert vars(stream.traffic) == dict.fromkeys(("uploads", "uploaded", "downloads", "downloaded"), 0)


def test_arrays_that_are_no_frames_are_rejected(load, host):
    frames = noise(4, 24, 32, 3)
    for held, words in ((frames.astype(np.float32), "float32"), (frames[..., :2], r"\[4, 24, 32, 2\]")):
        with pytest.raises(TangoError, match=words):
            open_source(OnDevice(host, held, "dlpack"))
    for kind in ("cuda_array_interface", "dlpack"):
        with pytest.raises(TangoError, match="a frame is not contiguous"):
            load(sample(OnDevice(host, frames[:, :, ::2], kind), 2), 2, SIZE)
    with pytest.raises(TangoError, match="on a GPU, and is wanted on the host"):
        preprocess(sample(OnDevice(host, frames, "dlpack"), 2), SIZE)
    with pytest.raises(TangoError, match="there are no frames"):
        load([], 1, SIZE)
    with pytest.raises(TangoError, match="a frame is float32"):
        load([(0.0, frames[0].repeat(4, 0)), (1.0, frames[0].astype(np.float32))], 2, SIZE)


class Decoder:
    """A GPU's decoder: FFmpeg's, whose frames are put into device memory as NV12, with gaps between the rows.

    Attributes:
        refuses: Why it decodes nothing.
        lies: It gives another frame than it should, once.
    """

    def __init__(self, host, monkeypatch):
        self.refuses, self.lies, self.decoded, self._host = "", False, 0, host
        monkeypatch.setattr(decoding, "open_video", self._open)
        monkeypatch.setattr(file, "YuvFrame", self)
        monkeypatch.setattr(file, "_WORTH", 1)

    def _open(self, path, *, device=None, **options):
        if device is not None and self.refuses:
            raise HardwareError(self.refuses)
        assert device is None or self._host.flags == self._host.cudaDeviceScheduleBlockingSync
        return open_video(path, **options)

    def of(self, frame):
        if self.lies:
            self.lies = False
            raise decoding.DisagreementError("another frame")
        height, width = frame.height, frame.width
        held = np.full((height + height // 2, width + 16), 77, np.uint8)
        y, u, v = (np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes)
        held[:height, :width] = y
        held[height:, :width] = np.stack((u, v), -1).reshape(height // 2, width)
        address, pitch = held.ctypes.data, width + 16
        self._host.blocks[address] = (held, held.nbytes)
        self.decoded += 1
        where = (NV12, address, address + height * pitch, pitch, height, width)
        return YuvFrame(*where, int(frame.colorspace), int(frame.color_range) == 2, turn_of(frame), held)


@pytest.fixture
def decoder(host, monkeypatch):
    return Decoder(host, monkeypatch)


@pytest.mark.parametrize("sampling", ["exact", "keyframes"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_file_that_the_gpu_decodes(load, stream, host, decoder, tmp_path, sampling, turned):
    path = write(tmp_path / "clip.mp4")
    if turned:
        show(path, 0, 1, -1, 0)
    right = preprocess(sample(path, 7, sampling=sampling), SIZE)
    frames = sample(path, 7, sampling=sampling)
    batch = load(frames, 7, SIZE)
    assert decoder.decoded == (5 if sampling == "keyframes" else 7)
    np.testing.assert_array_equal(array(batch.frames), right.host_frames)
    np.testing.assert_array_equal(batch.seconds, right.seconds)
    assert batch.aspect == right.aspect == (0.75 if turned else 4 / 3)
    assert stream.traffic.uploads == 0
    assert host.flags == 0


@pytest.mark.parametrize("fault", ["refuses", "lies"])
def test_what_the_gpu_does_not_decode_is_decoded_in_software(load, decoder, tmp_path, fault, caplog):
    path = write(tmp_path / "clip.mp4")
    setattr(decoder, fault, "another frame")
    right = preprocess(sample(path, 7), SIZE)
    for _ in range(2):
        setattr(decoder, fault, "another frame")
        batch = load(sample(path, 7), 7, SIZE)
        found = array(batch.frames) if isinstance(batch.frames, DeviceArray) else batch.frames
        np.testing.assert_array_equal(found, right.host_frames)
    assert [record.getMessage() for record in caplog.records] == [f"{path} is decoded in software: another frame"]


def cuda_frame(**changes):
    """What PyAV gives of a frame in a GPU's memory."""
    planes = SimpleNamespace(line_size=2048, buffer_ptr=1 << 20), SimpleNamespace(line_size=2048, buffer_ptr=1 << 24)
    facts = {"format": SimpleNamespace(name="cuda"), "sw_format": SimpleNamespace(name="p010le"), "planes": planes}
    facts |= {"height": 34, "width": 60, "colorspace": 9, "color_range": 1}
    return SimpleNamespace(**facts | changes)


def test_a_frame_of_the_gpus_decoder(monkeypatch):
    monkeypatch.setattr(yuv, "turn_of", lambda frame: Turn(True, False, True))
    frame = cuda_frame()
    found = YuvFrame.of(frame)
    assert (found.format, found.image, found.chroma, found.pitch) == (P010, 1 << 20, 1 << 24, 2048)
    assert (found.rows, found.columns, found.shown, found.matrix, found.full_range) == (34, 60, (60, 34), 9, False)
    assert found.owner is frame
    assert YuvFrame.of(cuda_frame(color_range=2)).full_range


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": SimpleNamespace(name="yuv444p")}, "yuv444p"),
        ({"sw_format": SimpleNamespace(name="yuv444p16le")}, "yuv444p16le"),
        ({"colorspace": 8}, "color space 8"),
        ({"planes": (SimpleNamespace(line_size=64), SimpleNamespace(line_size=32))}, "64 and 32 bytes"),
    ],
)
def test_a_frame_that_is_not_converted_on_the_gpu(changes, reason):
    with pytest.raises(HardwareError, match=reason):
        YuvFrame.of(cuda_frame(**changes))


def test_a_little_is_not_worth_a_decoder_of_the_gpu(load, decoder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(file, "_WORTH", 1 << 40)
    load(sample(write(tmp_path / "clip.mp4"), 7), 7, SIZE)
    assert decoder.decoded == 0
    assert not caplog.records


def test_a_process_that_decodes_for_another(decoder, tmp_path, monkeypatch):
    asked, decode_on = [], file.VideoFile.decode_on
    monkeypatch.setattr(file.VideoFile, "decode_on", lambda *given: (asked.append(given[3]), decode_on(*given))[1])
    path = write(tmp_path / "clip.mp4")
    right = preprocess(sample(path, 7), SIZE)
    load = GpuDecoder()
    first, second = (load(sample(path, count), count, SIZE) for count in (7, 3))
    assert (decoder.decoded, asked) == (10, [1, 1])
    np.testing.assert_array_equal(first.host_frames, right.host_frames)  # the second's are elsewhere
    np.testing.assert_array_equal(first.seconds, right.seconds)
    assert second.host_frames.shape == (3, *SIZE, 3)


def test_ten_bits_are_left_to_software_where_others_decode_in_software(host, decoder, tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "clip.mp4")
    monkeypatch.setattr(frames_module, "NV12", -1)  # so what the decoder gives is something else
    batch = GpuDecoder()(sample(path, 7), 7, SIZE)
    np.testing.assert_array_equal(batch.host_frames, preprocess(sample(path, 7), SIZE).host_frames)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is decoded in software: software converts its 10 bits otherwise"
    ]


@pytest.fixture
def llm(host, tiny_bundle):
    import onnxruntime

    made, stream = VideoLLM(tiny_bundle, "ort-cpu"), Stream()
    graphs = OrtRunner(onnxruntime, made.bundle, stream, ("CPUExecutionProvider", "cpu"))
    made._backend = CudaBackend(made.bundle, graphs, stream)
    return made


def test_answers_are_those_of_the_host(llm, host, tiny_bundle):
    frames = noise(8, 100, 160, 3)
    right = VideoLLM(tiny_bundle, "ort-cpu").generate(frames, QUESTION, frames=4, max_new_tokens=8)
    for source in (frames, OnDevice(host, frames, "dlpack")):
        answer = llm.generate(source, QUESTION, frames=4, max_new_tokens=8)
        assert (answer.ids, answer.kept) == (right.ids, right.kept)
        np.testing.assert_array_equal(answer.frames, right.frames)
        assert answer.aspect == right.aspect


def test_a_session_keeps_its_frames_when_another_video_comes(llm):
    videos = noise(2, 4, 100, 160, 3)
    sessions = [llm.session(video, frames=4) for video in videos]
    sessions[0].close()
    size = llm.bundle.manifest.video.size
    for session, video in zip(sessions, videos, strict=True):
        np.testing.assert_array_equal(session.frames, [resize(frame, size) for frame in video])


def test_device_memory_is_given_back(load, host, stream, monkeypatch):
    held = []
    for _ in range(3):
        load([(float(i), noise(60, 90, 3)) for i in range(5)], 5, SIZE)
        held.append((host.held(), host.allocations))
    assert held[0] == held[1] == held[2]
    assert device.cudart() is host
