"""Time and memory of `tango calibrate` on a checkpoint of a released shape, filled at random.

    python -m benchmarks.bench_calibrate SCRATCH --size 7b --decoder int8 int4 --json results.json

Checkpoint and bundle are made in SCRATCH, unless they exist. Each precision runs in its own process on generated clips.
The losses of random weights mean nothing, but take as long to measure as others. The 7B needs 50 GB of disk. On a
CPU it needs memory for its decoder's weights in fp32 (28 GB) and 5 GB more, on a GPU 11 GB of the host's.

``peak_bytes`` is the process's ``ru_maxrss``, which includes mapped pages of the bundle that can be dropped.
``private_peak_bytes`` is the sampled maximum of its anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.make_checkpoint import RELEASED, make
from tango_calibration.quantization.replay import CPU, CUDA
from tango_export.export import Request, export
from tango_runtime.bench.conditions import machine
from tango_runtime.util.console import status

_INTERVAL_S = 0.1


def make_bundle(scratch: Path, size: str, layers: int | None) -> Path:
    """The bundle of a released shape in fp16, or of its first decoder layers."""
    shape = RELEASED[size] if layers is None else replace(RELEASED[size], layers=layers)
    root = scratch / f"{size}-{shape.layers}"
    llava, siglip = root / "llava", root / "siglip"
    if not siglip.is_dir():
        make(root, shape=shape, outliers=False)
    if not (root / "bundle").is_dir():
        export(Request(checkpoint=str(llava), salience=str(siglip), output=root / "bundle"))
    return root / "bundle"


def measure(bundle: Path, decoder: str, more: list[str]) -> dict[str, Any]:
    """Calibrates in a new process, and keeps the output beside the bundle."""
    output = bundle.with_name(decoder)
    command = [sys.executable, "-m", "tango_runtime.cli.main", "calibrate", str(bundle), "--output", str(output)]
    command += ["--overwrite", "--clips", "synthetic", "--vision", "fp16", "--decoder", decoder, *more]
    command += ["--report-dir", f"{output}.report"]
    begin, private = time.monotonic(), 0
    process = subprocess.Popen(command)
    while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        private = max(private, _private_bytes(process.pid))
        time.sleep(_INTERVAL_S)
    _, code, usage = ended
    if code:
        raise SystemExit(f"failed: {' '.join(command)}")
    report = json.loads(Path(f"{output}.report", "calibration.json").read_text(encoding="utf-8"))
    return {
        "decoder": decoder,
        "seconds": round(time.monotonic() - begin, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "private_peak_bytes": private,
        **{key: report["graphs"]["decoder"][key] for key in ("bytes_before", "bytes_after")},
        "layers": len(report["graphs"]["decoder"]["layers"]),
    }


def _private_bytes(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) * 1024 if found else 0  # a process that has just ended has no such line


def main() -> None:
    """Measures every precision; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, metavar="SCRATCH", help="folder of checkpoint, bundles and observations")
    parser.add_argument("--size", choices=RELEASED, default="7b", help="released shape (default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers, fewer for a smaller machine")
    parser.add_argument("--decoder", choices=("int8", "int4"), nargs="+", default=["int8", "int4"])
    parser.add_argument("--videos", type=int, default=4, help="clips (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=2, help="length of an answer (default: %(default)s)")
    parser.add_argument("--backend", choices=(CPU, CUDA), default=CPU, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and conditions")
    args = parser.parse_args()
    more = [
        f"--backend={args.backend}",
        f"--videos={args.videos}",
        f"--frames={args.frames}",
        f"--max-new-tokens={args.max_new_tokens}",
    ]
    bundle = make_bundle(args.scratch, args.size, args.layers)
    records = []
    for decoder in args.decoder:
        records.append(measure(bundle, decoder, more))
        status(json.dumps(records[-1]))
    found = {"size": args.size, "options": more, "machine": machine(), "records": records}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
