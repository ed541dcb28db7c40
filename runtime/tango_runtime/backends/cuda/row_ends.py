"""Row ends on the device: the CUDA library puts them between the kept tokens."""

from __future__ import annotations

from tango_plugins import TangoError, native_library
from tango_plugins.device_array import DeviceArray, item_bytes
from tango_runtime.backends.cuda.device import Stream


def enqueue_gather(
    rows: DeviceArray, filler: DeviceArray, order: DeviceArray, gathered: DeviceArray, stream: Stream
) -> None:
    """Fills ``gathered`` [M, D] with ``rows`` [K, D] in an order [M] int32, and with ``filler`` [1, D] where it is −1.

    Raises:
        TangoError: There is no CUDA library, or CUDA failed.
    """
    library = native_library.load()
    count, width = gathered.shape
    addresses = rows.address, filler.address, order.address
    row_bytes = width * item_bytes(gathered.dtype)
    if library.tango_rows_gather_enqueue(*addresses, count, row_bytes, gathered.address, stream.handle) != 0:
        raise TangoError(f"rows cannot be gathered: {library.tango_last_error().decode()}", "see: tango doctor")
