"""What a bundle's linear layers see while the chain works as it will be used.

A clip goes through the chain once: vision, pruning at the bundle's ratio, the prompt, the answer's tokens one by one.
Kept of it are the indices of the tokens and the embeddings that the decoder was given (a :class:`Prompted`). From these
the decoder can be run again at will, so ranges and losses are measured on pruned prompts without the chain.

ONNX Runtime's calibraters are not used: they feed a graph from outside and keep every activation of all clips, and know
neither a cache that one pass hands to the next nor channels that are smoothed before they are counted.

What was observed of a clip is kept in a folder under a hash of bundle, clip and question, so an interrupted run goes on
where it was and another precision of the same bundle observes nothing again.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from tango_calibration.data.dataset import QUESTIONS, Rendered, Video, read_folder, synthetic
from tango_calibration.data.questions import Question
from tango_plugins import TangoError, reference
from tango_runtime.backends.base import Backend
from tango_runtime.backends.ort_cpu import empty_cache
from tango_runtime.bundle import MANIFEST, Bundle, GraphName, TensorSpec, sha256
from tango_runtime.pipeline.generate import Limits, PromptCache, decode_loop
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.pipeline.sampling import Sampler
from tango_runtime.pipeline.timer import StageTimer
from tango_runtime.util.console import OnProgress
from tango_runtime.video import sample
from tango_runtime.video.preprocess import preprocess

Array = NDArray[Any]
Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

SYNTHETIC = "synthetic"

#: Ranges of fewer clips tell more of the clips than of the model.
FEWEST_CLIPS = 4

_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
_QUESTION = "What happens in this video?"

#: Tokens of one pass over a prompt: every layer's activations of a pass are in memory at once.
_PASS = 256

#: Of a histogram.
_BINS = 2048
#: Share of the magnitudes that ``percentile`` lets a range hold.
_SHARE = 0.9999
#: Steps of an 8-bit magnitude.
_LEVELS = 128


# Clips


def read_clips(clips: str, count: int, frames: int, seed: int = 0) -> list[Video]:
    """The videos to be observed, each with one question.

    Args:
        clips: A folder of videos, with or without a questions.jsonl, or ``synthetic``.
        count: Most of them.
        frames: Frames sampled of each.
        seed: Of generated clips; they are of the validation split, which no evaluation shows.

    Raises:
        TangoError: There is no such folder, or it holds too few videos.
    """
    videos = _synthetic(count, frames, seed) if clips == SYNTHETIC else _folder(Path(clips), frames)[:count]
    if len(videos) < FEWEST_CLIPS:
        raise TangoError(
            f"{clips} gives {len(videos)} clips", f"calibration needs at least {FEWEST_CLIPS}: add some (--videos)"
        )
    return videos


def _synthetic(count: int, frames: int, seed: int) -> list[Video]:
    return synthetic(count, seed=seed, questions=1, frames=frames, split="validation")


def _folder(folder: Path, frames: int) -> list[Video]:
    if not folder.is_dir():
        raise TangoError(f"there is no folder {folder}", f"name a folder of videos, or {SYNTHETIC}")
    if (folder / QUESTIONS).is_file():
        return read_folder(folder, frames)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise TangoError(
            f"there are no clips in {folder}", f"put videos there ({', '.join(_SUFFIXES)}), or name {SYNTHETIC}"
        )
    asked = (Question("describe", _QUESTION, ""),)
    names = [str(file.relative_to(folder)) for file in files]
    return [Video(name, file, frames, asked, (name,)) for name, file in zip(names, files, strict=True)]


def see(bundle: Bundle, video: Video) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A clip's frames as the vision graph takes them [F, size, size, 3] and their times in seconds [F].

    Raises:
        TangoError: The clip cannot be read.
    """
    try:
        return preprocess(sample(video.source, video.frames), bundle.manifest.video.size[0])
    except TangoError as error:
        raise TangoError(f"clip {video.name}: {error.message}", error.hint) from error


def counted(videos: Sequence[Video], on_progress: OnProgress) -> Iterator[Video]:
    """The videos, one by one; ``on_progress`` is told when the next is asked for."""
    for video in videos:
        yield video
        on_progress(1)


# The chain, once


@dataclass(frozen=True)
class Prompted:
    """What the decoder was given.

    Attributes:
        prompt: Embeddings [N, D]: text, what was kept of the video, text.
        answer: Embeddings of the answer's tokens [M, D], which came one by one.
    """

    prompt: Array
    answer: Array


@dataclass(frozen=True)
class Watched:
    """A clip that went through the chain.

    Attributes:
        indices: Video tokens that were kept [K] int32.
        merged: Which of them stand for several [K] bool.
        prompted: What the decoder was given.
    """

    indices: NDArray[np.int32]
    merged: NDArray[np.bool_]
    prompted: Prompted


def watch(bundle: Bundle, stages: Backend, prompt: Prompt, video: Video, max_new_tokens: int) -> Watched:
    """Runs the chain on a clip and its first question, answered greedily."""
    frames, seconds = see(bundle, video)
    features, salience = (stages.to_host(t) for t in stages.vision(frames, lambda done: None))
    pruned = reference.prune(features, salience, seconds, bundle.manifest.params)
    before, after = prompt.encode(video.questions[0].text)
    newline = np.array(bundle.manifest.prompt.after_video, np.int64)
    texts = [stages.to_host(stages.embed(ids)) for ids in (before, np.concatenate((newline, after)))]
    whole = np.concatenate((texts[0], pruned.tokens, texts[1]))
    room = min(max_new_tokens, bundle.manifest.decoder.context - len(whole))
    if room < 1:
        raise TangoError(
            f"clip {video.name}: its prompt takes {len(whole)} tokens of {bundle.manifest.decoder.context}",
            "use fewer frames (--frames)",
        )
    ids: list[int] = []
    cache = PromptCache(stages, [whole], [], len(whole), bundle.manifest.decoder.context)
    try:
        for _ in decode_loop(cache, [], Sampler(), Limits.of(bundle.manifest, room), ids, StageTimer(stages)):
            pass
    finally:
        cache.close()
    return Watched(
        pruned.indices, pruned.merged, Prompted(whole, stages.to_host(stages.embed(np.array(ids, np.int64))))
    )


# Graphs that tell more


def open_graph(model: ModelProto, folder: Path, more: Sequence[str] = ()) -> onnxruntime.InferenceSession:
    """A session of a graph that is not on the disk, on ONNX Runtime's CPU engine.

    Args:
        model: The graph.
        folder: Where its external data lies.
        more: Tensors that become outputs, behind its own.

    Raises:
        TangoError: ONNX Runtime cannot load it.
    """
    told = ModelProto()
    told.CopyFrom(model)
    told.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in more)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    if any(proto.data_type == TensorProto.FLOAT8E4M3FN for proto in model.graph.initializer):
        # It would move pairs over operators that know no fp8, and refuse its own graph.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(told.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise TangoError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load a quantised graph: {str(error).splitlines()[0]}",
            "install a newer onnxruntime",
        ) from error


def run_vision(session: onnxruntime.InferenceSession, frames: NDArray[np.uint8]) -> Iterator[list[Array]]:
    """All outputs of the vision graph, frame by frame."""
    for i in range(len(frames)):
        yield session.run(None, {"frames": frames[i : i + 1]})


def run_decoder(
    session: onnxruntime.InferenceSession, specs: Sequence[TensorSpec], prompted: Prompted
) -> Iterator[list[Array]]:
    """Logits and all further outputs of the decoder, pass by pass: the prompt in parts, then each token of the answer.

    Args:
        session: Of the decoder, or of a graph made of it.
        specs: The decoder's inputs.
        prompted: What it is given.

    Yields:
        Logits [vocabulary], then the outputs behind the new rows of the cache.
    """
    parts = [prompted.prompt[begin : begin + _PASS] for begin in range(0, len(prompted.prompt), _PASS)]
    cache = empty_cache(specs[2:], 0)
    length = 0
    for part in itertools.chain(parts, prompted.answer[:, None]):
        positions = np.arange(length, length + len(part), dtype=np.int64)
        logits, *rest = session.run(None, {"embeddings": part, "positions": positions, **cache})
        length += len(part)
        rows, more = rest[: len(cache)], rest[len(cache) :]
        cache = {name: np.concatenate((cache[name], new), 1) for name, new in zip(cache, rows, strict=True)}
        yield [logits, *more]


# Statistics


@dataclass
class Channels:
    """Of each tensor's channels: the largest magnitude, and the sum of squares.

    Attributes:
        peaks: For each tensor [channels].
        squares: For each tensor [channels].
        counts: For each tensor: rows seen.
    """

    peaks: list[NDArray[np.float32]]
    squares: list[NDArray[np.float64]]
    counts: list[int]

    @classmethod
    def of(cls, tensors: Sequence[Array]) -> Channels:
        """Of one pass."""
        rows = [tensor.reshape(-1, tensor.shape[-1]).astype(np.float32) for tensor in tensors]
        return cls(
            [np.abs(x).max(0) for x in rows],
            [np.square(x, dtype=np.float64).sum(0) for x in rows],
            list(map(len, rows)),
        )

    def merge(self, other: Channels) -> Channels:
        """Of both."""
        return Channels(
            [np.maximum(a, b) for a, b in zip(self.peaks, other.peaks, strict=True)],
            [a + b for a, b in zip(self.squares, other.squares, strict=True)],
            [a + b for a, b in zip(self.counts, other.counts, strict=True)],
        )

    def energies(self) -> list[NDArray[np.float32]]:
        """Mean square of each channel."""
        return [(s / max(n, 1)).astype(np.float32) for s, n in zip(self.squares, self.counts, strict=True)]


@dataclass
class Histograms:
    """Of each tensor: how its magnitudes are spread.

    The bins of a tensor divide [0, 2^top) evenly. Two histograms whose tops differ become one by adding neighbours, so
    no range need be known before.

    Attributes:
        counts: [tensors, bins] int64.
        tops: [tensors] int64.
        peaks: The largest magnitudes [tensors] fp32.
    """

    counts: NDArray[np.int64]
    tops: NDArray[np.int64]
    peaks: NDArray[np.float32]

    @classmethod
    def of(cls, tensors: Sequence[Array]) -> Histograms:
        """Of one pass."""
        counts = np.zeros((len(tensors), _BINS), np.int64)
        peaks = np.array([np.abs(x).max(initial=0) for x in tensors], np.float32)
        tops = np.frexp(np.maximum(peaks, np.float32(2.0**-24)))[1].astype(np.int64)  # a peak is below 2^top
        for row, top, tensor in zip(counts, tops, tensors, strict=True):
            bins = (np.abs(tensor, dtype=np.float32).ravel() * np.float32(_BINS * 2.0**-top)).astype(np.int32)
            row += np.bincount(bins, minlength=_BINS)
        return cls(counts, tops, peaks)

    def merge(self, other: Histograms) -> Histograms:
        """Of both."""
        tops = np.maximum(self.tops, other.tops)
        counts = np.stack(
            [
                _widened(a, int(top - t)) + _widened(b, int(top - u))
                for a, b, t, u, top in zip(self.counts, other.counts, self.tops, other.tops, tops, strict=True)
            ]
        )
        return Histograms(counts, tops, np.maximum(self.peaks, other.peaks))

    def ranges(self, method: Method) -> list[float]:
        """For each tensor the largest magnitude that its 8-bit values are to hold."""
        how = {"minmax": lambda counts: _BINS, "percentile": _percentile, "entropy": _entropy}[method]
        bins = [how(counts) for counts in self.counts]
        widths = np.exp2(self.tops.astype(np.float64)) / _BINS
        return [min(float(p), b * w) for p, b, w in zip(self.peaks, bins, widths, strict=True)]


def _widened(counts: NDArray[np.int64], octaves: int) -> NDArray[np.int64]:
    """The same counts in bins 2^octaves times as wide."""
    wide = np.zeros_like(counts)
    joined = np.add.reduceat(counts, np.arange(0, len(counts), 1 << min(octaves, 11)))
    wide[: len(joined)] = joined
    return wide


def _percentile(counts: NDArray[np.int64]) -> int:
    """Bins that hold so large a share of the magnitudes."""
    return int(np.searchsorted(np.cumsum(counts), _SHARE * counts.sum())) + 1


def _entropy(counts: NDArray[np.int64]) -> int:
    """Bins whose clipped distribution loses least to 8 bits, by Kullback-Leibler divergence.

    TensorRT's calibration: S. Migacz, 8-bit Inference with TensorRT, GTC 2017. The first bin is left out: it holds the
    zeros, which any scale holds exactly, and after a GELU they would drown the rest.

    The divergence counts values, not their squares, so it spends its steps where most values are and clips the few
    large ones, which carry a transformer's signal: behind the GELUs of an earlier models/tiny it kept a third to a half
    of the range that minmax does, and vision got 21 times the noise, 4 times with the range of least squared error.
    """
    shares = counts.astype(np.float64)
    shares[0] = 0
    used = int(np.flatnonzero(shares)[-1]) + 1 if shares.any() else _LEVELS
    tried = range(_LEVELS, max(used, _LEVELS) + 8, 8)
    losses = [_divergence(shares, min(end, _BINS)) for end in tried]
    return min(tried[int(np.argmin(losses))], _BINS)


def _divergence(counts: NDArray[np.float64], end: int) -> float:
    """Of the first ``end`` bins, all beyond moved into the last, from themselves in ``_LEVELS`` steps."""
    real = counts[:end].copy()
    starts = np.arange(_LEVELS) * end // _LEVELS
    widths = np.diff(np.append(starts, end))
    filled = real > 0
    level = np.repeat(np.arange(_LEVELS), widths)
    held = np.bincount(level, filled, _LEVELS)
    coarse = np.where(filled, (np.bincount(level, real, _LEVELS) / np.maximum(held, 1))[level], 0)
    real[-1] += counts[end:].sum()
    if not coarse.sum():
        return np.inf
    p, q = real / real.sum(), coarse / coarse.sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))).sum())


# What is kept of a clip


class Cache:
    """What was observed of each clip, on disk.

    Args:
        folder: Where.
        bundle: The bundle.
        max_new_tokens: Most tokens of an answer.
    """

    def __init__(self, folder: Path, bundle: Bundle, max_new_tokens: int) -> None:
        self.folder = folder
        self._bundle = f"{sha256(bundle.path / MANIFEST)} {max_new_tokens}"

    def key(self, video: Video, what: str) -> str:
        """Name of what is kept: a hash of all that it hangs on."""
        source = video.source
        clip = repr(source) if isinstance(source, Rendered) else _content(Path(str(source)))
        text = "\n".join([self._bundle, clip, str(video.frames), video.questions[0].text, what])
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def arrays(self, key: str, make: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """What is kept under a key; it is made if there is nothing, and stands there whole or not at all."""
        file = self.folder / f"{key}.npz"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            made, partial = make(), file.with_suffix(f".{os.getpid()}.partial")
            try:
                with partial.open("wb") as stream:
                    np.savez(stream, **made)  # type: ignore[arg-type]
                partial.rename(file)
            finally:
                partial.unlink(missing_ok=True)
            return made
        try:
            with np.load(file) as found:
                return dict(found)
        except Exception as error:  # zipfile's, NumPy's and the system's have no common class
            raise TangoError(f"{file} is damaged: {error}", f"remove it: rm {file}") from error

    def watched(self, video: Video, make: Callable[[], Watched]) -> Watched:
        """A clip that went through the chain."""

        def arrays() -> dict[str, Array]:
            made = make()
            return {
                "indices": made.indices,
                "merged": made.merged,
                "prompt": made.prompted.prompt,
                "answer": made.prompted.answer,
            }

        found = self.arrays(self.key(video, "watched"), arrays)
        return Watched(found["indices"], found["merged"], Prompted(found["prompt"], found["answer"]))

    def channels(self, video: Video, graph: GraphName, make: Callable[[], Channels]) -> Channels:
        """Of the inputs of a graph's linear layers."""

        def arrays() -> dict[str, Array]:
            made = make()
            widths = np.array([len(p) for p in made.peaks])
            counts = np.array(made.counts)
            flat = np.concatenate(made.peaks), np.concatenate(made.squares)
            return {"widths": widths, "counts": counts, "peaks": flat[0], "squares": flat[1]}

        found = self.arrays(self.key(video, f"channels {graph}"), arrays)
        ends = np.cumsum(found["widths"])[:-1]
        return Channels(np.split(found["peaks"], ends), np.split(found["squares"], ends), found["counts"].tolist())

    def histograms(self, video: Video, what: str, make: Callable[[], Histograms]) -> Histograms:
        """Of the inputs of a graph's linear layers, smoothed or not."""
        found = self.arrays(self.key(video, f"histograms {what}"), lambda: vars(make()))
        return Histograms(**found)


def _content(path: Path) -> str:
    """A hash of a file, or of the files in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return " ".join(map(sha256, files))
