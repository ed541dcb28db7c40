"""What the endpoints ask: models, their videos and streams, behind one worker. Of HTTP it knows the errors alone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.server.answerer import Answerer, Emit, Ending, EvictedError, VideoKey
from tango_runtime.server.chat import ChatRequest, Media, VideoOptions
from tango_runtime.server.decoders import DecodedClip, Decoders
from tango_runtime.server.errors import ApiError
from tango_runtime.server.events import anext_of
from tango_runtime.server.media import MediaStore
from tango_runtime.server.metrics import Metrics
from tango_runtime.server.pushed import PushedFrames
from tango_runtime.server.rtsp import checked_rtsp
from tango_runtime.server.settings import Settings
from tango_runtime.server.streams import Stream, Streams, open_live, played
from tango_runtime.server.worker import Job, Worker
from tango_runtime.video.address import KINDS, is_live, redacted

_log = logging.getLogger("tango_runtime.server")

#: Threads that bring and decode media; others wait.
_MEDIA_THREADS = 8

#: The source of a stream whose frames its client sends.
PUSH = "push:"

#: Seconds that a camera is watched, where a chat does not say how long; and between two looks at a stream.
_WATCHED_S, _POLL_S = 8.0, 0.02

_Work = tuple[Generator[None, None, None], Hashable]


class Service:
    """Loaded models, and what is asked of them.

    Args:
        models: Loaded bundles by name; the first is the default.
        settings: Limits.
    """

    def __init__(self, models: Mapping[str, VideoLLM], settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.store = MediaStore(settings)
        self.decoders = Decoders(settings.decoders, settings.decode_seconds, settings.decode_memory)
        self.answerer = Answerer(models, settings, self.metrics)
        self.streams = Streams(settings.streams, self.metrics)
        self.worker = Worker(settings.waiting, settings.together, self.streams.turn)
        self.draining = False
        self._threads = ThreadPoolExecutor(_MEDIA_THREADS, "tango-media")
        self._locks = [Lock() for _ in range(64)]
        self._clips: WeakValueDictionary[VideoKey, DecodedClip] = WeakValueDictionary()
        self.metrics.gauge("vllm:num_requests_running", lambda: self.worker.running)
        self.metrics.gauge("vllm:num_requests_waiting", lambda: self.worker.waiting)
        self.metrics.gauge("tango:streams", lambda: len(self.streams))
        self.metrics.gauge("tango:stream_load", lambda: self.streams.load)
        self.metrics.gauge("tango:stream_lag_seconds", lambda: self.streams.lag)

    def close(self) -> None:
        """Does the work that is left, and gives everything back."""
        self.draining = True
        self.worker.close()
        self.streams.close()
        self._threads.shutdown(cancel_futures=True)
        self.decoders.close()
        self.store.close()

    async def ask(self, chat: ChatRequest) -> AsyncGenerator[str | Ending, None]:
        """Pieces of an answer and its ending."""
        if isinstance(chat.json_schema, Mapping):  # the model's thread does not wait for the compiler
            compiled = await self.in_thread(self.answerer.models[chat.model].compile_schema, chat.json_schema)
            chat = replace(chat, json_schema=compiled)
        url = chat.media.urls[0]
        if url.startswith("rtsp:"):
            async with aclosing(self._ask_camera(chat, url)) as items:
                async for item in items:
                    yield item
            return
        if chat.options.seconds is not None:
            raise ApiError(400, "seconds is for rtsp: videos; others have frames and fps", "seconds")
        if url.startswith("stream:"):
            stream = self.streams.get(url)
            await self._first_frames(stream)
            async with aclosing(self._ask_stream(chat, stream)) as items:
                async for item in items:
                    yield item
            return

        def job(key: VideoKey, clip: DecodedClip | None, emit: Emit) -> _Work:
            return self.answerer.answer(chat, key, clip, emit), None

        async with aclosing(self._about_video(chat.model, chat.media, chat.options, job)) as items:
            async for item in items:
                yield item

    async def view(self, model: str, url: str, options: VideoOptions) -> dict[str, Any]:
        """What is kept of a video or a stream, and its frames."""

        def job(key: VideoKey, clip: DecodedClip | None, emit: Emit) -> _Work:
            return self.answerer.view(key, options, clip, emit), None

        if url.startswith("stream:"):
            stream = self.streams.get(url)
            await self._first_frames(stream)
            items = self._run(lambda emit: (self.answerer.view_live(stream, emit), stream.name), dict)
        else:
            items = self._about_video(model, Media((url,)), options, job, dict)
        async with aclosing(items):
            found: dict[str, Any] = await anext_of(items)
            return found

    async def _first_frames(self, stream: Stream) -> None:
        """Waits for the first frames of a stream that was just opened; without one, the answerer raises."""
        deadline = time.monotonic() + self.settings.first_frame_seconds
        while not (stream.live.window.held or stream.over or self.draining) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)

    async def _ask_stream(self, chat: ChatRequest, stream: Stream) -> AsyncGenerator[str | Ending, None]:
        if stream.model != chat.model:
            raise ApiError(400, f"{stream.name} is read by {stream.model}, not by {chat.model}", "model")
        live = self._run(lambda emit: (self.answerer.answer_live(chat, stream, emit), stream.name), Ending)
        async with aclosing(live):
            async for item in live:
                yield item

    async def _ask_camera(self, chat: ChatRequest, url: str) -> AsyncGenerator[str | Ending, None]:
        """Watches a camera for a while, as a stream of its own, and answers about that."""
        options = chat.options
        frames = options.frames or self.answerer.models[chat.model].bundle.manifest.video.frames
        seconds = options.seconds or (frames / options.fps if options.fps else _WATCHED_S)
        if seconds > self.settings.watch_seconds:
            raise ApiError(400, f"a camera is watched for at most {self.settings.watch_seconds:g} s", "seconds")
        fps = options.fps or frames / seconds
        stream = await self.open_stream(chat.model, url, replace(options, frames=frames), fps)
        try:
            deadline = time.monotonic() + seconds + self.settings.fetch_seconds  # connecting takes time, too
            while not (stream.live.window.full or stream.over or time.monotonic() > deadline):
                if stream.live.window.held and stream.live.window.elapsed >= seconds:
                    break  # the camera has fewer frames a second
                await asyncio.sleep(_POLL_S)
            async with aclosing(self._ask_stream(chat, stream)) as items:
                async for item in items:
                    yield item
        finally:
            self.streams.discard(stream.name)
            self.worker.wake()

    async def open_stream(self, model: str, source: str, options: VideoOptions, fps: float) -> Stream:
        """Opens a stream of a source, at ``fps`` frames a second."""
        if options.frames is not None and options.frames > self.settings.max_frames:
            raise ApiError(400, f"a window has at most {self.settings.max_frames} frames", "window")
        frames = await self.in_thread(self._source, source, fps)
        opened = partial(
            open_live,
            self.answerer.models[model],
            frames,
            window=options.frames,
            fps=fps,
            ratio=options.retention_ratio,
            wake=self.worker.wake,
        )
        stream: Stream = await self._on_worker(lambda: self.streams.add(model, fps, opened))
        stream.source = redacted(source) if "://" in source else source
        stream.pushed = frames if isinstance(frames, PushedFrames) else None
        return stream

    async def remove_stream(self, stream: Stream) -> None:
        """Closes a stream, once the worker is at no question about it."""
        await self._on_worker(lambda: self.streams.remove(stream.name), stream.name)

    def decode_frame(self, model: str, data: bytes) -> NDArray[np.uint8]:
        """A pushed image as a frame, uint8 [H, W, 3]."""
        path = self.store.new_file()
        try:
            path.write_bytes(data)
            frames = self.decoders.decode({**self._media(model), "paths": [str(path)], "whole": True}).frames
            return frames.reshape(frames.shape[1:])
        finally:
            path.unlink(missing_ok=True)

    async def _about_video(
        self,
        model: str,
        media: Media,
        options: VideoOptions,
        job: Callable[[VideoKey, DecodedClip | None, Emit], _Work],
        last: type = Ending,
    ) -> AsyncGenerator[Any, None]:
        """What a job emits about a video, which is brought here and decoded unless it is known."""
        for again in (False, True):
            key, clip = await self.in_thread(self._bring, model, media, options, again)
            try:
                async with aclosing(self._run(partial(job, key, clip), last)) as items:
                    async for item in items:
                        yield item
                return
            except EvictedError:
                continue
        raise ApiError(503, "the video was forgotten while it waited; ask again", headers={"Retry-After": "1"})

    def _bring(
        self, model: str, media: Media, options: VideoOptions, again: bool
    ) -> tuple[VideoKey, DecodedClip | None]:
        """A video's key, and its frames unless they are encoded already; on a thread of its own."""
        with self.store.local(media) as local:
            key = VideoKey.of(model, local.digest, options)
            with self._locks[hash(key) % len(self._locks)]:
                if self.answerer.knows(key) and not again:
                    return key, None
                clip = self._clips.get(key)
                if clip is None:
                    clip = self._clips[key] = self.decoders.decode(
                        {
                            **self._media(model),
                            "paths": [str(path) for path in local.paths],
                            "images": local.images,
                            "seconds": local.seconds,
                            "frames": options.frames,
                            "fps": options.fps,
                            "max_pixels": options.max_pixels,
                        }
                    )
                return key, clip

    def _media(self, model: str) -> dict[str, Any]:
        """What the decoders are told of a model."""
        llm, most = self.answerer.models[model], self.settings.max_frames
        return {"bundle": str(llm.bundle.path.resolve()), "fixed": llm.frame_size, "most": most}

    async def _run(self, make: Callable[[Emit], _Work], last: type) -> AsyncGenerator[Any, None]:
        """What a job emits, up to the first of a type; the job is cancelled where nobody reads on."""
        loop, found = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def emit(item: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads
                loop.call_soon_threadsafe(found.put_nowait, item)

        work, name = make(emit)
        job, deadline = Job(work, emit, name), time.monotonic() + self.settings.answer_seconds
        try:
            self.worker.submit(job)
        except ApiError as error:
            if error.status == 429:
                self.metrics.add("tango:requests_refused_total")
            raise
        ended = False
        try:
            while not ended:
                try:
                    item = await asyncio.wait_for(found.get(), max(deadline - time.monotonic(), 0.001))
                except (asyncio.TimeoutError, TimeoutError) as error:
                    raise ApiError(503, f"no answer within {self.settings.answer_seconds:g} s") from error
                if isinstance(item, Exception):
                    ended = True
                    if not isinstance(item, (ApiError, TangoError, EvictedError)):
                        _log.error("the model failed", exc_info=item)
                    raise item if isinstance(item, EvictedError) else ApiError.of(item) from item
                ended = isinstance(item, last)
                yield item
        finally:
            if not ended:
                self.metrics.add("tango:requests_cancelled_total")
                self.worker.cancel(job)

    async def _on_worker(self, call: Callable[[], Any], key: Hashable = None) -> Any:
        """The result of a call on the worker's thread, once no other work of its key is in progress there."""

        def work(emit: Emit) -> Generator[None, None, None]:
            emit((call(),))
            yield

        async for item in self._run(lambda emit: (work(emit), key), tuple):
            return item[0]
        raise ApiError(500, "the server gave no result")

    async def in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call on one of the threads that bring media."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)
        except TangoError as error:
            raise ApiError.of(error) from error

    def _source(self, url: str, fps: float) -> Any:
        """What a stream's source names, as an iterable of frames."""
        if url.startswith("file:"):
            with self.store.local(Media((url,))) as local:
                return played(local.paths[0], fps)
        if url == PUSH:
            return PushedFrames(self.settings.idle_seconds)
        if url.lower().startswith("rtsp:"):
            limits = self.settings
            return checked_rtsp(url, limits.rtsp_hosts, allow_private=limits.allow_private)
        if url.partition("://")[0].lower() in KINDS and is_live(url):
            if not self.settings.allow_private:  # FFmpeg connects by itself: no address of it can be checked before
                raise ApiError(403, "streams of other hosts are opened only with --allow-private", "source")
            return url
        raise ApiError(
            400, f"a stream's source is rtsp://, http://, https://, {PUSH}, or file: under the media root", "source"
        )

    def model(self, name: str) -> str:
        """The model's name, or the default's."""
        if not name:
            return next(iter(self.answerer.models))
        if name not in self.answerer.models:
            raise ApiError(
                404, f"there is no model {name[:60]!r}; there are {', '.join(self.answerer.models)}", "model"
            )
        return name
