"""Features and salience of the newest steps of frames, in the memory of the device."""

from __future__ import annotations

from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import Pool, Stream, rows


class DeviceFeatureRing:
    """See :class:`tango_runtime.backends.base.FeatureRing`; steps are copied on the device, in the stream's order.

    Args:
        steps: Steps that it has room for.
        stream: What copies.
        shared: The backend's memory, for steps whose places do not follow each other.
    """

    def __init__(self, steps: int, stream: Stream, shared: Pool) -> None:
        self.held = 0
        self._room, self._next = steps, 0
        self._stream, self._shared, self._own = stream, shared, Pool()
        self._tensors: dict[str, DeviceArray] = {}

    def append(self, features: DeviceArray, salience: DeviceArray) -> None:
        """Adds steps, features [T, L, D] and salience [T, L]; where there is no room, they replace the oldest."""
        count = features.shape[0]
        for name, new in {"features": features, "salience": salience}.items():
            if name not in self._tensors:
                self._tensors[name] = self._own.take(name, (self._room, *new.shape[1:]), new.dtype)
            kept = min(count, self._room)
            self._put(self._tensors[name], rows(new, count - kept, count))
        self._next = (self._next + min(count, self._room)) % self._room
        self.held = min(self.held + count, self._room)

    def newest(self, steps: int) -> tuple[DeviceArray, DeviceArray]:
        """The newest ``steps`` steps, oldest first."""
        return self._newest("features", steps), self._newest("salience", steps)

    def clear(self) -> None:
        """Forgets all steps."""
        self._tensors, self.held, self._next = {}, 0, 0

    def _put(self, ring: DeviceArray, new: DeviceArray) -> None:
        count = new.shape[0]
        first = min(count, self._room - self._next)
        self._stream.copy(rows(new, 0, first), rows(ring, self._next, self._next + first))
        if first < count:
            self._stream.copy(rows(new, first, count), rows(ring, 0, count - first))

    def _newest(self, name: str, steps: int) -> DeviceArray:
        ring, begin = self._tensors[name], (self._next - steps) % self._room
        if begin + steps <= self._room:
            return rows(ring, begin, begin + steps)
        first = self._room - begin
        window = self._shared.take(f"window of {name}", (steps, *ring.shape[1:]), ring.dtype)
        self._stream.copy(rows(ring, begin, self._room), rows(window, 0, first))
        self._stream.copy(rows(ring, 0, steps - first), rows(window, first, steps))
        return window
