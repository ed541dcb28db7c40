"""Results of calibration's passes over each clip, cached on disk.

A file is named by a hash of the bundle, the clip and the question. So an interrupted calibration resumes, and another
precision of the same bundle reuses the captures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np

from tango_calibration.data.dataset import Rendered, Video
from tango_calibration.quantization.capture import Capture, DecoderInput
from tango_calibration.quantization.ranges import Array, ChannelStats
from tango_plugins import TangoError
from tango_plugins.thinning import Thinning
from tango_runtime.bundle import MANIFEST, Bundle, sha256
from tango_runtime.util.files import atomic_write

#: The kind of result that is a capture.
CAPTURE = "capture and thinning"


def channels_of(part: str) -> str:
    """The kind of result that is a part's statistics."""
    return f"channels {part}"


class ObservationCache:
    """Captures, statistics and losses of one bundle.

    Args:
        folder: Folder of the files.
        bundle: The bundle that is calibrated.
        max_new_tokens: Maximum length of an answer.
        backend: What the results were measured on: another one rounds differently.
    """

    def __init__(self, folder: Path, bundle: Bundle, max_new_tokens: int, backend: str = "ort-cpu") -> None:
        self.folder = folder
        self._bundle = f"{sha256(bundle.path / MANIFEST)} {max_new_tokens} {backend}"

    def key(self, video: Video, kind: str) -> str:
        """Key of a result of this kind: a hash of everything it depends on."""
        source = video.source
        clip = repr(source) if isinstance(source, Rendered) else _content_hash(Path(str(source)))
        text = "\n".join([self._bundle, clip, str(video.frames), video.questions[0].text, kind])
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def holds(self, video: Video, kind: str) -> bool:
        """Whether a result of this kind is there."""
        return self._file(self.key(video, kind)).is_file()

    def arrays(self, key: str, make: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """Reads the arrays of a key, or makes and stores them. An incomplete file never appears.

        Raises:
            TangoError: The file is damaged.
        """
        file = self._file(key)
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            made = make()
            atomic_write(file, lambda stream: np.savez(stream, **made))  # type: ignore[arg-type]
            return made
        try:
            with np.load(file) as found:
                return dict(found)
        except Exception as error:  # the errors of zipfile, NumPy and the system have no common class
            raise TangoError(f"{file} is damaged: {error}", f"remove it: rm {file}") from error

    def capture(self, video: Video, make: Callable[[], Capture]) -> Capture:
        """What the pipeline computed for a clip."""

        def arrays() -> dict[str, Array]:
            made = make()
            return {
                "indices": made.indices,
                "merged": made.merged,
                "prompt": made.decoder_input.prompt,
                "answer": made.decoder_input.answer,
                "rotary": made.decoder_input.rotary,
                "thinning": np.array(astuple(thinning) if (thinning := made.decoder_input.thinning) else ()),
            }

        found = self.arrays(self.key(video, CAPTURE), arrays)
        thinning = Thinning(*map(int, found["thinning"])) if found["thinning"].size else None
        taken = DecoderInput(found["prompt"], found["answer"], found["rotary"], thinning)
        return Capture(found["indices"], found["merged"], taken)

    def channel_stats(self, video: Video, part: str, make: Callable[[], ChannelStats]) -> ChannelStats:
        """Statistics of the inputs of the linear layers of vision or the decoder."""

        def arrays() -> dict[str, Array]:
            made = make()
            channels = np.array([len(amax) for amax in made.amax])
            flat = np.concatenate(made.amax), np.concatenate(made.square_sums)
            return {"channels": channels, "rows": np.array(made.rows), "amax": flat[0], "square_sums": flat[1]}

        found = self.arrays(self.key(video, channels_of(part)), arrays)
        ends = np.cumsum(found["channels"])[:-1]
        amax, square_sums = (np.split(found[name], ends) for name in ("amax", "square_sums"))
        return ChannelStats(amax, square_sums, found["rows"].tolist())

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.npz"


def _content_hash(path: Path) -> str:
    """Hash of a file, or of the files in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return " ".join(map(sha256, files))
