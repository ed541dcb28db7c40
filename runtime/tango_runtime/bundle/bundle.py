"""A bundle on disk: a folder of graphs with the manifest that describes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tango_plugins import TangoError
from tango_runtime.bundle.external_data import external_files
from tango_runtime.bundle.manifest import MANIFEST, FileSpec, GraphForm, GraphName, Manifest, read_manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, checked.

    Attributes:
        path: Its folder.
        manifest: The content of its bundle.json.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> Bundle:
        """Reads and checks a bundle.

        Args:
            path: The bundle's folder.
            verify: Also compare every file's SHA-256, which reads all of it.

        Raises:
            TangoError: There is no bundle, its bundle.json does not fit the schema, a file is missing, truncated or
                (with ``verify``) changed, or a graph keeps weights outside its data file. The message names the file.
        """
        path = Path(path)
        bundle = cls(path, read_manifest(path))
        bundle._check_files(verify)
        return bundle

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files.

        Raises:
            TangoError: bundle.json does not list it.
        """
        if name not in self.manifest.files:
            raise TangoError(f"{self.path / MANIFEST}: files has no {name}", "export the bundle again")
        return self.path / name

    def text(self, name: str) -> str:
        """Content of one of the bundle's text files.

        Raises:
            TangoError: bundle.json does not list it, or it is not UTF-8.
        """
        try:
            return self.file(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TangoError(
                f"{self.path / name} is not valid UTF-8: {error}", "copy the bundle again, or export it again"
            ) from error

    def graph(self, name: GraphName) -> Path:
        """Path of a graph's ONNX file."""
        return self.path / self.manifest.graphs[name].file

    def engine_graph(self, name: GraphName, form: GraphForm = "portable") -> Path:
        """Path of the ONNX file that TensorRT builds a graph's engine from."""
        return self.path / self.manifest.engine_files(name, form)[0]

    def graph_bytes(self, name: GraphName) -> int:
        """Size of all files of a graph."""
        return sum(self.manifest.files[file].size for file in self.manifest.graph_files(name))

    def _check_files(self, verify: bool) -> None:
        again = "copy the bundle again, or export it again"
        for name in (name for graph in self.manifest.graphs.values() for name in graph.files):
            if name not in self.manifest.files:
                raise TangoError(f"{self.path / MANIFEST}: files has no {name}, a graph", again)
        for name, spec in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise TangoError(f"{self.path} has no {name}, which its {MANIFEST} lists", again)
            size = file.stat().st_size
            if size != spec.size:
                raise TangoError(f"{file} has {size} bytes, {MANIFEST} says {spec.size}", again)
            if verify and sha256(file) != spec.sha256:
                raise TangoError(f"{file} has changed: its SHA-256 is not the one in {MANIFEST}", again)
        for graph in self.manifest.graphs.values():
            for name in graph.files:
                _check_data(self.path / name, graph.data)


def _check_data(graph: Path, data: str) -> None:
    """Rejects a file that is not a graph, or a graph that keeps weights outside its data file."""
    hint = "check the bundle with: tango inspect BUNDLE --verify"
    try:
        elsewhere = external_files(graph) - {data}
    except ValueError as error:
        raise TangoError(f"{graph} is no ONNX graph: {error}", hint) from error
    if elsewhere:
        raise TangoError(f"{graph} keeps weights in {min(elsewhere)!r}, not in {data}", hint)


def describe(file: Path) -> FileSpec:
    """Size and hash of a file, for the manifest."""
    return FileSpec(file.stat().st_size, sha256(file))


def sha256(file: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
