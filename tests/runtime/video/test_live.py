"""LiveSource by itself: what it keeps, drops and says, with a camera that does what a test wants."""

from __future__ import annotations

import threading
from itertools import islice

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.video import LiveSource, open_source
from tango_runtime.video.preprocess import resize
from tests.fakes.camera import FakeCamera, FakeClock


def numbered(count, fps=10, camera=None, start=0):
    camera = camera or FakeCamera(ends=True)
    for i in range(count):
        camera.show(start + i / fps, i)
    return camera


def levels(frames):
    return [int(frame[0, 0, 0]) for _, _, frame in frames]


def test_frames_are_taken_at_the_wanted_rate_from_the_first_on():
    camera = numbered(31, start=5000.0)
    camera.end()
    with LiveSource(camera, fps=2, lossless=True) as live:
        frames = list(live)
    assert levels(frames) == [0, 5, 10, 15, 20, 25, 30]
    assert [number for number, _, _ in frames] == list(range(7))
    np.testing.assert_allclose([seconds for _, seconds, _ in frames], np.arange(7) / 2)
    assert live.dropped == live.reconnects == 0


def test_all_frames_of_a_stream_that_has_fewer_than_wanted():
    camera = numbered(5, fps=3)
    camera.end()
    with LiveSource(camera, fps=50, lossless=True) as live:
        assert levels(live) == [0, 1, 2, 3, 4]


def test_the_oldest_frames_leave_the_ring_for_the_newest():
    camera = numbered(10)
    camera.end()
    with LiveSource(camera, fps=10, capacity=3) as live:
        live._thread.join()
        frames = list(live)
        assert levels(frames) == [7, 8, 9]
        assert [number for number, _, _ in frames] == [7, 8, 9]
        assert live.dropped == 7


def test_frames_that_somebody_had_are_not_dropped():
    camera = numbered(3)
    with LiveSource(camera, fps=10, capacity=3) as live:
        assert levels(live.latest(3)) == [0, 1, 2]
        numbered(3, camera=camera, start=0.3).fail("it broke", "mend it")
        live._thread.join()
        assert live.dropped == 0
        assert levels(islice(live, 3)) == [0, 1, 2]


def test_a_lossless_source_waits_for_its_reader():
    camera = numbered(50)
    camera.end()
    with LiveSource(camera, fps=10, capacity=2, lossless=True) as live:
        assert levels(live) == list(range(50))
    assert live.dropped == 0


def test_the_newest_frames_are_a_source_of_their_own():
    camera = numbered(8)
    camera.end()
    with LiveSource(camera, fps=10, capacity=8) as live:
        live._thread.join()
        window = live.latest(4)
    source = open_source([(seconds, frame) for _, seconds, frame in window])
    read = list(source.read(source.sample(4)))
    assert [int(frame[0, 0, 0]) for _, frame in read] == [4, 5, 6, 7]
    np.testing.assert_allclose([seconds for seconds, _ in read], np.arange(4) / 10)


def test_times_go_on_after_a_cut_by_this_machines_clock():
    clock = FakeClock()
    camera = FakeCamera(clock=clock)
    camera.show(70.0, 1, at=1000.0)
    camera.show(71.0, 2, at=1001.0)
    camera.cut(at=1001.5)
    camera.show(3.0, 3, at=1005.0)  # the camera's clock began anew
    camera.show(4.0, 4, at=1006.0)
    with LiveSource(camera, fps=1, clock=clock) as live:
        frames = list(islice(live, 4))
        assert live.reconnects == 1
    assert levels(frames) == [1, 2, 3, 4]
    np.testing.assert_allclose([seconds for _, seconds, _ in frames], [0, 1, 5, 6])


def test_times_that_step_within_a_connection_follow_this_machines_clock():
    clock = FakeClock()
    camera = FakeCamera(clock=clock)
    for at, seconds in ((1000, 0), (1001, 1), (1002, 5000), (1003, 5001), (1004, 2), (1005, 3), (1005, 3)):
        camera.show(seconds, 0, at=at)
    with LiveSource(camera, fps=1000, clock=clock) as live:
        found = [seconds for _, seconds, _ in islice(live, 7)]
    np.testing.assert_allclose(found, [0, 1, 2, 3, 4, 5, 5.001])


def test_a_pipes_own_times_count_however_fast_it_comes():
    camera = FakeCamera(ends=True)
    for seconds in (0, 60, 120):
        camera.show(seconds, 0)
    camera.end()
    with LiveSource(camera, fps=1, lossless=True) as live:
        assert [seconds for _, seconds, _ in live] == [0, 60, 120]


def test_no_picture_for_too_long_is_an_error_with_its_reason():
    clock = FakeClock()
    camera = FakeCamera(clock=clock)
    camera.show(0.0, 1, at=1000.0)
    camera.cut("connection refused", at=1009.9)
    camera.cut("host unreachable", at=1010.1)
    with LiveSource(camera, stall=10, clock=clock) as live:
        iterator = iter(live)
        assert next(iterator).number == 0
        with pytest.raises(TangoError, match="the camera gave no picture for 10 s: host unreachable") as error:
            next(iterator)
        assert "check the address" in error.value.hint
        with pytest.raises(TangoError, match="host unreachable"):
            live.latest(1)


def test_data_without_pictures_is_a_stall_too():
    clock = FakeClock()
    camera = FakeCamera(clock=clock)
    camera.silence(at=1001.0)
    camera.silence(at=1010.5)
    with LiveSource(camera, stall=10, clock=clock) as live, pytest.raises(TangoError, match="it sends no video"):
        next(iter(live))


def test_what_is_final_is_not_tried_again():
    camera = FakeCamera()
    camera.fail("the camera wants a password", "give it")
    with LiveSource(camera) as live, pytest.raises(TangoError, match="wants a password"):
        live.latest(1)
    assert camera.connections == 1


def test_a_stream_that_ends_too_early_says_how_many_frames_it_had():
    camera = numbered(3)
    camera.end()
    with LiveSource(camera, fps=10) as live, pytest.raises(TangoError, match="ended after 3 frames"):
        live.latest(4)


def test_frames_are_resized_as_the_vision_graph_would():
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    camera = FakeCamera()
    camera.show(0.0, noise)
    with LiveSource(camera, size=(16, 24)) as live:
        np.testing.assert_array_equal(live.latest(1)[0].frame, resize(noise, (16, 24)))


def test_the_size_may_change():
    camera = FakeCamera()
    camera.show(0.0, np.zeros((4, 6, 3), np.uint8))
    camera.show(1.0, np.zeros((8, 2, 3), np.uint8))
    with LiveSource(camera) as live:
        assert [frame.shape for _, _, frame in islice(live, 2)] == [(4, 6, 3), (8, 2, 3)]


def test_closing_ends_the_thread_and_whoever_waits():
    camera = FakeCamera()
    found = []
    with LiveSource(camera) as live:
        waiting = threading.Thread(target=lambda: found.extend(live))
        waiting.start()
    waiting.join()
    assert found == []
    assert not live._thread.is_alive()


def test_closing_frees_a_lossless_source_that_waits_for_its_reader():
    with LiveSource(numbered(9), fps=10, capacity=1, lossless=True) as live:
        next(iter(live))
    assert not live._thread.is_alive()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"fps": 0}, "fps is 0"), ({"stall": float("nan")}, "stall is nan"), ({"capacity": 0}, "0 frames")],
)
def test_arguments_out_of_range(options, said):
    with pytest.raises(TangoError, match=said):
        LiveSource(FakeCamera(), **options)


def test_no_more_frames_than_the_ring_holds():
    with LiveSource(FakeCamera(), capacity=4) as live, pytest.raises(TangoError, match="ring of 4"):
        live.latest(5)
