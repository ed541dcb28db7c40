"""Shared, read-only fixtures: checkpoints, bundles, a clip and frames. Session fixtures are made once per run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

# The products of these tests are small: a second thread of NumPy or torch takes as much again to wait for work. Their
# libraries read this as they are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

#: Edge of a frame: 8×8 patches and 4×4 tokens are enough for most tests.
IMAGE = 112

# A shell's background jobs, and their children, ignore ctrl-C. Tests send it to children, so restore the default.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No example of a property may fail for the time that it takes.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser):
    parser.addoption("--tensorrt-include", type=Path, help="folder of NvInfer.h, where it is not in a usual place")


#: What only the comparison with the original models needs: there is no wheel of them for every Python.
REFERENCE = ("torch", "transformers")


def skip_without_reference(error: ModuleNotFoundError) -> None:
    """Skips the test that an import failed in, if it was of what the extra ``validate`` installs."""
    if (error.name or "").split(".")[0] in REFERENCE:
        pytest.skip(f"{error.name} is not installed: pip install 'tango-edge[validate]'")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    try:
        return (yield)
    except ModuleNotFoundError as error:
        skip_without_reference(error)
        raise


pytest_runtest_setup = pytest_runtest_call


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The same for a module's imports, of whose error a report has only the text."""
    report = yield
    for name in REFERENCE if report.failed else ():
        if f"No module named '{name}" in str(report.longrepr):
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"{name} is not installed: pip install 'tango-edge[validate]'")
            report.result = []
            break
    return report


#: Where JetPack and NVIDIA's packages install TensorRT's headers.
USUAL = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/local/tensorrt/include")


@pytest.fixture(scope="session")
def tensorrt_headers(request: pytest.FixtureRequest) -> Path:
    """The folder of NvInfer.h."""
    named = request.config.getoption("--tensorrt-include")
    for folder in [named] if named else map(Path, USUAL):
        if (folder / "NvInfer.h").is_file():
            return Path(folder).resolve()
    assert named is None, f"{named} has no NvInfer.h"
    pytest.skip("there is no NvInfer.h (--tensorrt-include FOLDER)")


@pytest.fixture(scope="session")
def tensorrt_version(tensorrt_headers: Path) -> tuple[int, int]:
    """Major and minor version of these headers."""
    text = (tensorrt_headers / "NvInferVersion.h").read_text()
    major, minor = re.findall(r"define (?:NV_TENSORRT|TRT)_(?:MAJOR|MINOR)(?:_ENTERPRISE)? (\d+)", text)
    return int(major), int(minor)


@pytest.fixture(scope="session")
def emulated_plugins(tmp_path_factory: pytest.TempPathFactory, tensorrt_headers: Path) -> Path:
    """The CUDA library's operators as plugins of TensorRT, and as ONNX Runtime's operators, for a CPU."""
    from tests.plugins.cuda_emulator import compiled

    kernels = ("attention", "vision", "rotation", "patches", "norm", "activation", "linear", "products")
    parts = (*kernels, "operators", "onnxruntime", "tensorrt")
    flags = ("-Wno-deprecated-declarations",)
    return compiled(tmp_path_factory.mktemp("plugins"), *parts, flags=flags, headers=tensorrt_headers)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes of one core each; its head, where this process is, has none."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    found.nodes = [found.add_node(num_cpus=1) for _ in range(2)]
    yield found
    found.shutdown()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """``checkpoint(layout="llava-hf", dtype=…, shards=…, outliers=…, **shape)``: the folders (llava, siglip)."""
    from examples.make_checkpoint import Shape, make

    @cache
    def made(
        layout: str = "llava-hf", *, dtype: Any = None, shards: int = 1, outliers: bool = True, **shape: Any
    ) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("checkpoint")
        dimensions = Shape(**{"image": IMAGE, **shape})
        return make(folder, layout, dimensions, dtype=dtype, shards=shards, outliers=outliers)

    return made


@pytest.fixture(scope="session")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., tuple[Path, Path]]
) -> Callable[..., Path]:
    """``bundle(layout="llava-hf", precision="fp16", **checkpoint options)``: the folder of the bundle."""
    from examples.make_checkpoint import VIDEO_LAYOUT
    from tango_export.export import Request, export

    @cache
    def made(layout: str = "llava-hf", precision: str = "fp16", **options: Any) -> Path:
        llava, siglip = checkpoint(layout, **options)
        output = tmp_path_factory.mktemp("bundle") / f"{layout}-{precision}"
        model = "llava-video" if layout == VIDEO_LAYOUT else "llava-ov"
        return export(Request(model, str(llava), str(siglip), output, dtype=precision))

    return made


@pytest.fixture(scope="session")
def responsive_checkpoint(tmp_path_factory):
    """``responsive_checkpoint(layout, tied=…, outliers=…, seed=…, image=…, …)``: folders (checkpoint, bundle).

    Greedy answers of it depend on the video, the question and every token so far (see `_make_responsive`). The bundle
    has 4 frames of 16 tokens each, at the default frame size of 112, and a context of 2048 positions; its decoder has
    inner pruning with ``inner=(layer, ratio)``.
    """
    from examples.make_checkpoint import VIDEO_LAYOUT, Shape, make
    from tango_export.export import Request, export
    from tango_runtime.bundle import InnerPruning

    @cache
    def checkpoint(layout, tied, outliers, seed, image, layers):
        root = tmp_path_factory.mktemp("responsive_checkpoint")
        llava, siglip = make(root, layout, Shape(tied=tied, image=image, layers=layers), seed=seed, outliers=outliers)
        _make_responsive(llava, outliers)
        return llava, siglip

    def made(layout="llava-hf", tied=True, outliers=False, seed=0, image=112, dtype="fp32", layers=2, inner=None):
        llava, siglip = checkpoint(layout, tied, outliers, seed, image, layers)
        bundle = llava.parent / (f"{dtype}-{inner}" if inner else dtype)
        model = "llava-video" if layout == VIDEO_LAYOUT else "llava-ov"
        request = Request(model, str(llava), str(siglip), bundle, dtype=dtype, frames=4, context=2048)
        request = replace(request, inner=InnerPruning(*inner) if inner else None)
        return llava, bundle if bundle.exists() else export(request)

    return made


def _make_responsive(llava, outliers):
    """Rescales a random decoder until its answers depend on the video, the question and every token so far.

    Plain random weights repeat one token: the mean over all positions dominates. So attention is sharpened, layers add
    more to the residual, and all tokens are equally likely. Only the two stop tokens are made unlikely, so that answers
    reach the requested length.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(llava / "tokenizer.json"))
    stop = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    sharpening, gain = (2, 1) if outliers else (3, 16)  # with outliers, the norms no longer damp the layers' output
    file = llava / "model.safetensors"
    weights = {name: weight.float() for name, weight in load_file(file).items()}
    for name, weight in weights.items():
        if "tower" in name or "visual" in name:
            continue
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            weight *= sharpening
        elif name.endswith((".o_proj.weight", ".down_proj.weight")):
            weight[weight.abs().amax(1) < 3] *= gain  # only rows that feed no planted channel
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weight *= weight[0].norm() / weight.norm(dim=1, keepdim=True)
            weight[stop] *= 0.01
    save_file({name: weight.to(torch.float16) for name, weight in weights.items()}, file, {"format": "pt"})


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory):
    """``qwen_checkpoint(layout="hub", shards=…, outliers=…, seed=…, **shape)``: the folder of a Qwen2.5-VL."""
    from examples.make_qwen_checkpoint import Shape, make

    @cache
    def made(layout="hub", *, shards=1, outliers=True, seed=0, **shape):
        folder = tmp_path_factory.mktemp("qwen") / "checkpoint"
        return make(folder, layout, Shape(**shape), shards=shards, outliers=outliers, seed=seed)

    return made


@pytest.fixture(scope="session")
def qwen_bundle(tmp_path_factory, qwen_checkpoint):
    """``qwen_bundle(layout="hub", precision="fp16", **checkpoint options)``: the folder of its bundle."""
    from tango_export.export import Request, export

    @cache
    def made(layout="hub", precision="fp16", **options):
        folder, output = qwen_checkpoint(layout, **options), tmp_path_factory.mktemp("bundle") / f"qwen-{precision}"
        return export(Request("qwen2.5-vl", str(folder), output=output, dtype=precision))

    return made


@pytest.fixture(scope="session")
def responsive_qwen(tmp_path_factory):
    """``responsive_qwen(layout="hub", tied=…, dtype=…)``: folders (checkpoint, bundle), as `responsive_checkpoint`.

    The bundle has 4 frames of at most 9 tokens each step, and a context of 2048 positions.
    """
    from examples.make_qwen_checkpoint import Shape, make
    from tango_export.export import Request, export

    @cache
    def checkpoint(layout, tied, seed):
        folder = tmp_path_factory.mktemp("responsive_qwen") / "checkpoint"
        _make_responsive(make(folder, layout, Shape(tied=tied), seed=seed, outliers=False), outliers=False)
        return folder

    def made(layout="hub", tied=True, seed=0, dtype="fp32", time_step="seconds"):
        folder = checkpoint(layout, tied, seed)
        bundle = folder.parent / f"{dtype}-{time_step}"
        request = Request("qwen2.5-vl", str(folder), output=bundle, dtype=dtype, frames=4, context=2048)
        request = replace(request, max_pixels=9 * 28 * 28, time_step=time_step)
        return folder, bundle if bundle.exists() else export(request)

    return made


@pytest.fixture(scope="session")
def tiny_bundle(responsive_checkpoint):
    """Folder of the fp32 bundle that most pipeline tests use."""
    return responsive_checkpoint()[1]


@pytest.fixture
def question_first_bundle(tiny_bundle, tmp_path):
    """The same with a chat template that writes the question before the video."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "question-first")
    template = bundle / "chat_template.jinja"
    manifest = json.loads((bundle / "bundle.json").read_text())
    mark = manifest["prompt"]["placeholder"]
    template.write_text(
        "{{ messages[0]['content'][-1]['text'] }}" + mark + "{% if add_generation_prompt %}: {% endif %}"
    )
    manifest["files"][template.name]["size"] = template.stat().st_size
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    return bundle


@pytest.fixture(scope="session")
def llm(tiny_bundle):
    """The pipeline of `tiny_bundle`."""
    from tango_runtime import VideoLLM

    return VideoLLM(tiny_bundle)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A video file of 8 seconds."""
    from examples.make_video import write

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write(path)
    return path


@pytest.fixture
def frames():
    """uint8 [8, 36, 64, 3]: a bright block moves over noise; the noise changes at frame 5."""
    rng = np.random.default_rng(0)
    video = rng.integers(0, 120, (2, 36, 64, 3), dtype=np.uint8)[[0, 0, 0, 0, 0, 1, 1, 1]]
    for i, frame in enumerate(video):
        frame[10:20, 6 * i : 6 * i + 10] = (230, 60, 40)
    return video


@pytest.fixture
def colors():
    """uint8 [8, 36, 64, 3]: uniform frames, most unlike the previous one, so that pruning finds several segments."""
    palette = np.random.default_rng(1).integers(0, 255, (8, 1, 1, 3), dtype=np.uint8)
    return np.tile(palette[[0, 1, 2, 2, 4, 5, 6, 7]], (1, 36, 64, 1))
