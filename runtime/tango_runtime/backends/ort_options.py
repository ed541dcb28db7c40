"""Options of ONNX Runtime sessions whose INT8 products are exact on every CPU.

ONNX Runtime multiplies unsigned 8-bit activations by signed 8-bit weights. On an x86 CPU with AVX2 or AVX-512 but
without VNNI, its kernel adds two such products in int16, which saturates: 2 · 255 · 127 = 64770 becomes 32767. The
answers are then wrong, and nothing reports it. The option ``session.x64quantprecision`` makes the weights unsigned too,
and that kernel adds in int32. It takes 3 to 5 times as long where VNNI is there (docs/results/experiments.md), so it is
set only where a product shows that it is needed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

#: The graph y = MatMulInteger(x, w), x in uint8 and w in int8, as onnx writes it; this package does not depend on onnx.
PRODUCT = (
    b'\x08\x04:P\n\x18\n\x01x\n\x01w\x12\x01y"\rMatMulInteger\x12\x01g'
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x02\x12\x04\n\x00\n\x00Z\x0f\n\x01w\x12\n\n\x08\x08\x03\x12\x04\n\x00\n\x00"
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x06\x12\x04\n\x00\n\x00B\x04\n\x00\x10\n"
)


def session_options(*, threads: int = 0) -> Any:
    """Options for a session on any CPU.

    Args:
        threads: Threads of one operator; 0 takes one for each core.

    Returns:
        An ``onnxruntime.SessionOptions``.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if int8_saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


@cache
def int8_saturates() -> bool:
    """Whether ONNX Runtime's product of uint8 and int8 is wrong on this CPU.

    A product of the largest values tells, in less than a millisecond. Flags of the CPU would not: without AVX2 the
    kernel is exact again, and each release of ONNX Runtime chooses its kernels anew.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    weights = np.full((4, 16), 127, np.int8)
    # One row takes another kernel than several.
    batches = (np.full((rows, 4), 255, np.uint8) for rows in (1, 8))
    return any((session.run(None, {"x": x, "w": weights})[0] != 4 * 255 * 127).any() for x in batches)
