"""transformers on the shapes of the measured cases. Imported only for a comparison."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch._dynamo.utils import counters

from tango_plugins import TangoError
from tango_runtime.bench.conditions import without_folder
from tango_runtime.bench.measure import Measured, Samples, Setting
from tango_runtime.bundle import Manifest, VideoSpec
from tango_runtime.util.console import OnProgress
from tango_runtime.util.errors import first_line
from tango_runtime.video import sample
from tango_runtime.video.preprocess import preprocess
from tango_runtime.video.shape import choose_size

_CAPTURE_WARM_UP = 3  # steps before a capture, as in PyTorch's notes on CUDA graphs
_VARLEN = "flash_varlen_of_torch"  # transformers passes what attention needs of windows if "flash" is in its name

#: Runs a stage: the frames' encoder, or a prompt's positions.
_Stage = Callable[..., torch.Tensor]


@contextmanager
def _torch_errors() -> Iterator[None]:
    """Turns errors of torch into errors for the user."""
    try:
        yield
    except RuntimeError as error:  # out of memory, or an operation that a CUDA graph cannot record
        hint = "use fewer --frames, or drop --compare-torch"
        raise TangoError(f"transformers failed: {first_line(error)}", hint) from error


@contextmanager
def _compile_errors(part: str) -> Iterator[None]:
    """Names the part that cannot be compiled."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler fails in many ways; a backend's failure is wrapped
        cause = first_line(getattr(error, "inner_exception", error))
        hint = "torch.compile needs a C++ compiler, and Triton on a GPU; drop --torch-compile to compare without it"
        raise TangoError(f"torch.compile of the {part} failed: {cause}", hint) from error


@dataclass(frozen=True)
class Shape:
    """The input that both systems take.

    Attributes:
        clip: The source's frames, uint8 [F, height, width, 3].
        size: (height, width) of the frames after resizing.
        kept: Video tokens in the prompt, K.
        prompt_tokens: Positions of the prompt.
    """

    clip: NDArray[np.uint8]
    size: tuple[int, int]
    kept: int
    prompt_tokens: int

    @classmethod
    def of(cls, clip: NDArray[np.uint8], measured: Measured, video: VideoSpec, setting: Setting) -> Shape:
        """The shape of a measured case, whose frames get the size that the bundle gives them."""
        size = choose_size(video, len(clip), (clip.shape[1], clip.shape[2]), asked=setting.frame_size)
        return cls(clip, size, measured.kept, measured.prompt_tokens)

    def frames(self) -> NDArray[np.uint8]:
        """The clip's frames at their size, uint8 [F, height, width, 3]."""
        return np.asarray(preprocess(sample(self.clip, len(self.clip)), self.size).frames, np.uint8)


class Peer:
    """LLaVA-OneVision or Qwen2.5-VL of transformers, with random weights, on whose values its times do not depend.

    transformers does not prune: the first K of its video tokens take the place of the kept ones.

    Args:
        checkpoint: Folder or hub id with a config.json of the shapes.
        manifest: The bundle's.
        setting: Parameters that all cases share.
        gpu: Run on the GPU, otherwise on the CPU.
        compiles: Also run it with its tower and prefill compiled.

    Attributes:
        description: The peer in one line.
        compilations: What compiling took, one entry per part: system, part, frames, positions of the prompt, seconds of
            the first run, graphs, graph breaks.

    Raises:
        TangoError: The configuration is not available or belongs to another model, this torch has no CUDA, or torch
            fails, for example for lack of memory. The systems raise it too.
    """

    @_torch_errors()
    def __init__(
        self, checkpoint: str, manifest: Manifest, setting: Setting, gpu: bool, compiles: bool = False
    ) -> None:
        if gpu and not torch.cuda.is_available():
            raise TangoError(f"torch {torch.__version__} cannot use the GPU", "install a torch with CUDA")
        config, self._device = _config(checkpoint, manifest), torch.device("cuda" if gpu else "cpu")
        with self._device:
            self._model: Any = transformers.AutoModelForImageTextToText.from_config(
                config, dtype=getattr(torch, manifest.dtype), attn_implementation="sdpa"
            ).eval()
        self._setting = setting
        self._encode = {"llava_onevision": self._encode_llava, "qwen2_5_vl": self._encode_qwen}[config.model_type]
        self._compiles, self._windowed = compiles, config.model_type == "qwen2_5_vl"
        self.compilations: list[dict[str, Any]] = []
        self.description = (
            f"transformers {transformers.__version__}, torch {torch.__version__}, {self._device.type}, "
            f"{manifest.dtype}, sdpa, random weights of the shapes of {without_folder(checkpoint)}"
        )

    @property
    def systems(self) -> dict[str, Callable[[Shape, OnProgress], Samples]]:
        """Ways to run it, by name.

        ``transformers`` is eager with a growing cache, and ``CUDA graph`` its decode steps as a replayed CUDA graph.
        ``compiled`` ends with the first token: tower and prefill by torch.compile. In ``compiled, varlen`` one call of
        attention takes all windows of a tower.
        """
        systems: dict[str, Callable[[Shape, OnProgress], Samples]] = {"transformers": self._eager}
        if self._device.type == "cuda":
            systems["CUDA graph"] = self._graph
        if self._compiles:
            systems["compiled"] = self._compiled
        if self._compiles and self._windowed and self._device.type == "cuda":
            systems["compiled, varlen"] = self._varlen
        return systems

    @_torch_errors()
    @torch.inference_mode()
    def _eager(self, shape: Shape, on_progress: OnProgress) -> Samples:
        """All stages of the pipeline but pruning, from the source's frames to the last token."""
        return self._answers(shape, on_progress, self._encode, self._next, self._setting.decode_tokens)

    @_torch_errors()
    @torch.inference_mode()
    def _compiled(self, shape: Shape, on_progress: OnProgress, name: str = "compiled") -> Samples:
        """All stages up to the first token; tower and prefill are compiled for this shape before measuring."""
        torch.compiler.reset()
        encode, prefill = (torch.compile(stage, dynamic=False) for stage in (self._encode, self._next))
        frames = torch.from_numpy(shape.frames()).to(self._device)
        self._encode(frames)  # the first run installs hooks, which would break the graph
        # Otherwise what is compiled too often for different values runs eagerly from then on.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            with self._compiling(name, "vision tower", shape):
                features = encode(frames)
            with self._compiling(name, "prefill", shape):
                self._prefill(features, shape, self._new_cache(), prefill)
            return self._answers(shape, on_progress, encode, prefill, decode_tokens=0)

    def _varlen(self, shape: Shape, on_progress: OnProgress) -> Samples:
        """`_compiled`, with attention that takes all windows of a tower in one call."""
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            message = f"torch {torch.__version__} has no attention for windows of different lengths"
            raise TangoError(message, "install torch 2.10 or later") from error
        transformers.AttentionInterface.register(_VARLEN, _packed(varlen_attn))
        self._model.set_attn_implementation({"vision_config": _VARLEN})
        try:
            return self._compiled(shape, on_progress, "compiled, varlen")
        finally:
            self._model.set_attn_implementation({"vision_config": "sdpa"})

    @contextmanager
    def _compiling(self, name: str, part: str, shape: Shape) -> Iterator[None]:
        """Records what compiling the part took."""
        counters.clear()
        laps = _Laps(self._device)
        with _compile_errors(part):
            yield
        laps.add("compile")
        self.compilations.append(
            {
                "system": name,
                "part": part,
                "frames": len(shape.clip),
                "prompt_tokens": shape.prompt_tokens,
                "seconds": laps.found["compile"][0] / 1e3,
                "graphs": counters["stats"]["unique_graphs"],
                "graph_breaks": counters["graph_break"].total(),
            }
        )

    def _answers(
        self, shape: Shape, on_progress: OnProgress, encode: _Stage, prefill: _Stage, decode_tokens: int
    ) -> Samples:
        """Samples of the stages; without tokens to decode, up to the first token."""
        samples: Samples = {}
        for i in range(-self._setting.warm_up, self._setting.repeats):
            laps = _Laps(self._device)
            images = shape.frames()
            laps.add("video")
            frames = torch.from_numpy(images).to(self._device)
            laps.add("upload")
            features = encode(frames)
            laps.add("vision")
            cache = self._new_cache()
            token = self._prefill(features, shape, cache, prefill)
            laps.add("prefill")
            token.item()
            laps.total("first token")
            for _ in range(decode_tokens):
                token = self._next(cache, input_ids=token)
                token.item()
                laps.add("decode")
            if decode_tokens:
                laps.total("answer")
            _collect(samples, laps, i)
            on_progress(1)
        return samples

    @_torch_errors()
    @torch.inference_mode()
    def _graph(self, shape: Shape, on_progress: OnProgress) -> Samples:
        """Decode steps alone, after the same prompt: a cache of fixed capacity, one CUDA graph per step."""
        capacity = shape.prompt_tokens + max(self._setting.decode_tokens, 1 + _CAPTURE_WARM_UP)
        cache = transformers.StaticCache(config=self._model.config, max_cache_len=capacity)
        features = self._features_like(shape.kept)
        token = self._prefill(features, shape, cache, self._next)

        def step() -> None:
            token.copy_(self._next(cache, input_ids=token))

        replay, samples = self._recorded(step), Samples()
        for i in range(-self._setting.warm_up, self._setting.repeats):
            cache.reset()
            token.copy_(self._prefill(features, shape, cache, self._next))
            laps = _Laps(self._device)
            for _ in range(self._setting.decode_tokens):
                replay()
                token.item()
                laps.add("decode")
            _collect(samples, laps, i)
            on_progress(1)
        return samples

    def _encode_llava(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [F, size, size, 3] → [1, F·L, D]."""
        found: torch.Tensor = self._model.model.get_video_features(self._pixels(frames)[None]).pooler_output
        return found

    def _encode_qwen(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [F, height, width, 3] → [1, F/2·L, D]; one vector per patch, a token's in a row."""
        vision = self._model.config.vision_config
        size, side, pair = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        steps, rows, columns = (n // m for n, m in zip(frames.shape[:3], (pair, size, size), strict=True))
        split = self._pixels(frames).reshape(steps, pair, 3, rows // side, side, size, columns // side, side, size)
        patches = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * rows * columns, -1)
        grid = torch.tensor([[steps, rows, columns]], device=self._device)
        found: torch.Tensor = torch.cat(self._model.model.get_video_features(patches, grid).pooler_output)
        return found[None]

    def _pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [F, height, width, 3] → [F, 3, height, width], −1 to 1."""
        return frames.permute(0, 3, 1, 2).to(self._model.dtype) / 127.5 - 1

    def _features_like(self, kept: int) -> torch.Tensor:
        width = self._model.config.text_config.hidden_size
        return torch.zeros(1, kept, width, dtype=self._model.dtype, device=self._device)

    def _new_cache(self) -> Any:
        return transformers.DynamicCache(config=self._model.config)

    def _prefill(self, features: torch.Tensor, shape: Shape, cache: Any, prefill: _Stage) -> torch.Tensor:
        """[1, F·L, D] → the first token, [1, 1]."""
        ids = torch.zeros(1, shape.prompt_tokens - shape.kept, dtype=torch.long, device=self._device)
        text = self._model.get_input_embeddings()(ids)
        return prefill(cache, inputs_embeds=torch.cat((features[:, : shape.kept], text), 1))

    def _next(self, cache: Any, **given: torch.Tensor) -> torch.Tensor:
        logits = self._model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token: torch.Tensor = logits[:, -1].argmax(-1, keepdim=True)
        return token

    def _recorded(self, step: Callable[[], None]) -> Callable[[], None]:
        """A step captured as a CUDA graph; https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_CAPTURE_WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay: Callable[[], None] = graph.replay
        return replay


def _packed(varlen_attn: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, None]]:
    """PyTorch's attention of packed sequences in the form of transformers: [1, H, S, head_dim] → [1, S, H, head_dim].

    With "sdpa", transformers calls attention once for each window of Qwen2.5-VL: 720 times a layer for 32 frames of
    560×1008.
    """

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **given: Any
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        starts, longest = given["cu_seq_lens_q"], given["max_length_q"]
        return varlen_attn(q, k, v, starts, starts, longest, longest)[None], None

    return attend


class _Laps:
    """Milliseconds by the host's clock, read after the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.found = device, Samples()
        self._start = self._last = self._now()

    def add(self, name: str) -> None:
        """Records the time since the previous record."""
        now = self._now()
        self.found.setdefault(name, []).append(1e3 * (now - self._last))
        self._last = now

    def total(self, name: str) -> None:
        """Records the time since the start."""
        self._last = self._now()
        self.found[name] = [1e3 * (self._last - self._start)]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _collect(samples: Samples, laps: _Laps, i: int) -> None:
    if i >= 0:
        for name, values in laps.found.items():
            samples.setdefault(name, []).extend(values)


def _config(checkpoint: str, manifest: Manifest) -> Any:
    hint = "name a folder with the config.json of a llava-hf or Qwen2.5-VL checkpoint: --compare-torch FOLDER"
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise TangoError(f"transformers finds no configuration in {checkpoint}", hint) from error
    if config.model_type not in ("llava_onevision", "qwen2_5_vl"):
        raise TangoError(f"transformers reads {checkpoint} as a {config.model_type} model", hint)
    text, decoder = config.text_config, manifest.decoder
    found = (text.num_hidden_layers, text.hidden_size, text.num_key_value_heads)
    sides = {config.vision_config.image_size} if config.model_type == "llava_onevision" else set()
    if found != (decoder.layers, decoder.hidden_size, decoder.kv_heads) or not sides <= set(manifest.video.size):
        raise TangoError(
            f"{checkpoint} has other shapes than the bundle", "name the checkpoint that the bundle was exported from"
        )
    return config
