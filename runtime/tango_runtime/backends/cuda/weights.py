"""Weights in device memory, once: graphs and kernels get their addresses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import upload_file
from tango_runtime.bundle import Bundle, GraphName, GraphSpec


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
        begin, weights = self._file.address, spec.weights or {}
        super().__init__({name: DeviceArray(begin + w.offset, w.shape, w.dtype) for name, w in weights.items()})


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
