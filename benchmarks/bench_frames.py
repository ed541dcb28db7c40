"""Frames on the host → what the vision graph takes: resized by the host's threads, and by the GPU.

    python -m benchmarks.bench_frames [--frames 32] [--source 1080x1920] [--size 384x384] [--json FILE]

Both include the copy to the GPU. The values are compared first. On the GPU, the copy is the bottleneck: 199 MB at the
defaults, 8 ms over PCIe 4.0 at 25 GB/s.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL

from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.backend import open_stream
from tango_runtime.backends.cuda.device import HostPool, Pool, cudart
from tango_runtime.backends.cuda.frames import FrameLoader
from tango_runtime.cli.args import frame_size
from tango_runtime.video.preprocess import preprocess


def _milliseconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Ascending times of a function, after two calls that are not counted."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times[2:])


def main() -> None:
    """Measures both, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--source", type=frame_size, default=(1080, 1920), help="HEIGHTxWIDTH (default: 1080x1920)")
    parser.add_argument("--size", type=frame_size, default=(384, 384), help="HEIGHTxWIDTH (default: 384x384)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    stream, pool, pinned = open_stream(), Pool(), HostPool()
    shape = (args.frames, *args.size, 3)
    noise = np.random.default_rng(0).integers(0, 256, (args.frames, *args.source, 3), dtype=np.uint8)
    timed = [(float(i), frame) for i, frame in enumerate(noise)]
    load = FrameLoader(stream, pool)

    def on_host() -> None:
        batch = preprocess(timed, args.size, pinned.take(shape, np.uint8))
        stream.upload(batch.host_frames, pool.take("from the host", shape, np.uint8))
        stream.synchronize()

    on_host()
    found = load(timed, args.frames, args.size).frames
    assert isinstance(found, DeviceArray)
    same = np.array_equal(stream.download(found), stream.download(pool.take("from the host", shape, np.uint8)))
    times = {
        "host": _milliseconds(on_host, args.repeats),
        "gpu": _milliseconds(lambda: load(timed, args.frames, args.size), args.repeats),
    }
    for name, found_times in times.items():
        print(f"{name:<5} median {found_times[len(found_times) // 2]:8.2f} ms, minimum {found_times[0]:8.2f} ms")
    print("the values are the same" if same else "the values DIFFER")
    if args.json:
        gpu = cudart().cudaGetDeviceProperties(0)[1].name.decode()
        conditions = {"gpu": gpu, "machine": platform.machine(), "pillow": PIL.__version__, "source": args.source}
        args.json.write_text(json.dumps({**conditions, "size": args.size, "same": same, "ms": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
