"""Servers, a clip and where it is; what asks for them is skipped where the packages of the server are missing."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.runtime.server.serving import Running


@pytest.fixture(scope="session")
def media_root(tmp_path_factory, clip):
    """A folder with a clip, a link out of it, and a file beside it."""
    root = tmp_path_factory.mktemp("media")
    (root / "clip.mp4").write_bytes(clip.read_bytes())
    (root / "notes.txt").write_text("no video\n" * 100)
    outside = tmp_path_factory.mktemp("outside") / "secret.mp4"
    outside.write_bytes(clip.read_bytes())
    (root / "link.mp4").symlink_to(outside)
    return root


@pytest.fixture(scope="session")
def serving(tiny_bundle, media_root) -> Iterator[Callable[..., Running]]:
    """``serving(**settings)``: a server of `tiny_bundle`, called "tiny"; servers of the same settings are shared."""
    from tango_runtime import VideoLLM
    from tango_runtime.server.settings import Settings
    from tests.runtime.server.serving import running  # skips what asks for it, where a package is missing

    with ExitStack() as stack:
        made: dict[str, Running] = {}

        def serve(**settings) -> Running:
            name = repr(sorted(settings.items()))
            if name not in made:
                chosen = Settings(**{"media_root": media_root, "decoders": 1, **settings})
                model = VideoLLM(tiny_bundle, "ort-cpu")  # a model is used by one thread: each server has its own
                made[name] = stack.enter_context(running({"tiny": model}, chosen))
            return made[name]

        yield serve


@pytest.fixture
def served(serving) -> Running:
    """A server with the defaults."""
    return serving()


@pytest.fixture(scope="session")
def data_url(clip) -> str:
    """The clip as a data: URL."""
    return "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
