"""Weights in device memory, once: graphs and kernels get their addresses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tango_plugins.device_array import DeviceArray
from tango_plugins.matrix import Matrix
from tango_runtime.backends.cuda.device import Buffer, Stream, upload_file
from tango_runtime.bundle import Bundle, GraphName, GraphSpec

#: Bytes of the memory through which matrices are interleaved.
_WORKSPACE_BYTES = 64 << 20


class Weights(dict[str, DeviceArray]):
    """A graph's weights by name, views of its data file on the device, which they own.

    Args:
        folder: The bundle.
        spec: The graph, with the offsets of its weights.
        given_up: Set by whoever no longer waits for them.

    Raises:
        TangoError: The device has not enough memory.
    """

    def __init__(self, folder: Path, spec: GraphSpec, given_up: threading.Event) -> None:
        self._file = upload_file(folder / spec.data, given_up)
        begin, self._specs, self._interleaved = self._file.address, spec.weights or {}, False
        super().__init__({name: DeviceArray(begin + w.offset, w.shape, w.dtype) for name, w in self._specs.items()})

    def matrices(self) -> dict[str, Matrix]:
        """The matrices by the names that they have in fp16: a quantized one's ends in its format."""
        found = {}
        for name, stored in self._specs.items():
            if layout := stored.quantization:
                zeros = self[layout.zero_points] if layout.zero_points else None
                blocks = layout.bits, layout.group_size, bool(layout.group_size) and self._interleaved
                found[name.rpartition(".")[0]] = Matrix(self[name], self[layout.scales], zeros, *blocks)
            elif len(stored.shape) == 2 and name.endswith(".weight"):
                found[name] = Matrix(self[name])
        return found

    def interleave(self, stream: Stream, library: Path) -> None:
        """Puts the blocks of all matrices in the order in which the library's decode step reads them.

        Raises:
            TangoError: The device has not enough memory, or the library reports an error.
        """
        blocks = {name: matrix for name, matrix in self.matrices().items() if matrix.group}
        if not blocks:
            return
        workspace = Buffer(_WORKSPACE_BYTES)
        for name, matrix in blocks.items():
            matrix.interleave(name, workspace.view((workspace.size,), "uint8"), stream.handle, library)
        stream.synchronize()
        self._interleaved = True


def upload_weights(
    bundle: Bundle, graphs: Collection[GraphName], meanwhile: Callable[[], object]
) -> dict[GraphName, Weights]:
    """Uploads the weights of some graphs while a function does something else, such as loading them.

    Raises:
        TangoError: The device has not enough memory, or the function raised it.
    """
    given_up = threading.Event()
    with ThreadPoolExecutor() as threads:
        uploading = threads.map(lambda graph: Weights(bundle.path, bundle.manifest.graphs[graph], given_up), graphs)
        try:
            meanwhile()
            return dict(zip(graphs, uploading, strict=True))
        except BaseException:  # ctrl-C too: leaving this block waits for the uploads
            given_up.set()
            raise
