"""The server's endpoints: OpenAI's chat completions, uploads, streams, health and metrics, and the page."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tango_plugins import TangoError
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.server.chat import ChatRequest, Media, VideoOptions, as_object, parse_chat, parse_options, take_text
from tango_runtime.server.decoders import DecodedClip, Decoders
from tango_runtime.server.engine import Emit, Ending, Engine, EvictedError, VideoKey
from tango_runtime.server.errors import ApiError
from tango_runtime.server.events import ClientLeftError, EventStream, as_json, unless_left
from tango_runtime.server.media import MediaStore
from tango_runtime.server.metrics import Metrics
from tango_runtime.server.pushed import PushedFrames
from tango_runtime.server.rtsp import checked_rtsp
from tango_runtime.server.settings import Settings
from tango_runtime.server.streams import Stream, Streams, open_live, played
from tango_runtime.server.worker import Job, Worker
from tango_runtime.util.errors import first_line
from tango_runtime.video.address import KINDS, is_live, redacted

_log = logging.getLogger("tango_runtime.server")

#: Threads that bring and decode media; others wait.
_MEDIA_THREADS = 8

#: Bodies that may be in memory, in multiples of the largest.
_BODIES = 4

#: Bytes of a body that are parsed in less time than another thread takes to begin.
_SMALL = 1 << 16

#: The source of a stream whose frames its client sends.
PUSH = "push:"

#: Seconds that a camera is watched, where a chat does not say how long; and between two looks at a stream.
_WATCHED_S, _POLL_S = 8.0, 0.02

#: JPEG quality of the page's frames.
_QUALITY = 80


class Server:
    """Models behind HTTP.

    Args:
        models: Loaded bundles by name; the first is the default.
        settings: Limits.
    """

    def __init__(self, models: Mapping[str, VideoLLM], settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.store = MediaStore(settings)
        self.decoders = Decoders(settings.decoders, settings.decode_seconds, settings.decode_memory)
        self.engine = Engine(models, settings, self.metrics)
        self.streams = Streams(settings.streams, self.metrics)
        self.worker = Worker(settings.waiting, settings.together, self.streams.turn)
        self.draining = False
        self._began, self._bodies = int(time.time()), 0
        self._threads = ThreadPoolExecutor(_MEDIA_THREADS, "tango-media")
        self._locks = [Lock() for _ in range(64)]
        self._clips: WeakValueDictionary[VideoKey, DecodedClip] = WeakValueDictionary()
        self.metrics.gauge("vllm:num_requests_running", lambda: self.worker.running)
        self.metrics.gauge("vllm:num_requests_waiting", lambda: self.worker.waiting)
        self.metrics.gauge("tango:streams", lambda: len(self.streams))
        self.metrics.gauge("tango:stream_load", lambda: self.streams.load)
        self.metrics.gauge("tango:stream_lag_seconds", lambda: self.streams.lag)

    def app(self) -> ASGIApp:
        """The ASGI application; its lifespan's end closes the server."""
        guarded = partial(_Guarded, self)
        routes = [
            Route("/health", guarded(self._health)),
            Route("/ready", guarded(self._ready)),
            Route("/metrics", guarded(self._metrics)),
            Route("/v1/models", guarded(self._models)),
            Route("/v1/chat/completions", guarded(self._chat), methods=["POST"]),
            Route("/v1/videos", guarded(self._upload), methods=["POST"]),
            Route("/v1/videos/view", guarded(self._view), methods=["POST"]),
            Route("/v1/streams", guarded(self._list_streams), methods=["GET"]),
            Route("/v1/streams", guarded(self._add_stream), methods=["POST"]),
            Route("/v1/streams/{name}", guarded(self._one_stream), methods=["GET"]),
            Route("/v1/streams/{name}", guarded(self._remove_stream), methods=["DELETE"]),
            Route("/v1/streams/{name}/answers", guarded(self._watch_stream), methods=["POST"]),
            Route("/v1/streams/{name}/frames", guarded(self._push_frame), methods=["POST"]),
        ]
        files = Path(__file__).with_name("page")
        routes.append(Route("/", _PageFile(files / "index.html"), methods=["GET"]))
        routes += [Route(f"/{file.name}", _PageFile(file), methods=["GET"]) for file in files.iterdir()]
        cors = Middleware(
            CORSMiddleware, allow_origins=list(self.settings.origins), allow_methods=["*"], allow_headers=["*"]
        )

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.get_running_loop().run_in_executor(None, self.close)

        app = Starlette(routes=routes, middleware=[cors] if self.settings.origins else [], lifespan=lifespan)
        app.add_exception_handler(HTTPException, _http_error)
        return app

    def close(self) -> None:
        """Does the work that is left, and gives everything back."""
        self.draining = True
        self.worker.close()
        self.streams.close()
        self._threads.shutdown(cancel_futures=True)
        self.decoders.close()
        self.store.close()

    # What is open to everyone.

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        return JSONResponse({"ready": not self.draining}, 503 if self.draining else 200)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # OpenAI's.

    async def _models(self, request: Request) -> Response:
        models = [
            {
                "id": name,
                "object": "model",
                "created": self._began,
                "owned_by": "tango-edge",
                "max_model_len": llm.bundle.manifest.decoder.context,
                "frames": llm.bundle.manifest.video.frames,
                "retention_ratio": llm.bundle.manifest.params.retention_ratio,
            }
            for name, llm in self.engine.models.items()
        ]
        return JSONResponse({"object": "list", "data": models})

    async def _chat(self, request: Request) -> ASGIApp:
        chat = parse_chat(await self._json(request), self.settings.max_images)
        chat = self._with_model(chat)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
        events = self._ask(chat)
        try:
            first = await unless_left(request.receive, anext_of(events))
            if chat.stream:
                return EventStream(_chunks(head, chat, first, events), self.settings.send_seconds, events)
            pieces, ending = await unless_left(request.receive, _all(first, events))
        except BaseException:
            await events.aclose()
            raise
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ending.finish}
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": [choice], "usage": ending.usage, "tango": ending.details}
        )

    # Uploads, which the page shows.

    async def _upload(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith(("video/", "image/gif", "application/octet-stream")):
            raise ApiError(415, "the body is a video: give its type, or application/octet-stream")
        path = self.store.new_file()
        try:
            with path.open("wb") as file:
                size = 0
                async for piece in self._pieces(request, self.settings.max_media):
                    size += len(piece)
                    await asyncio.get_running_loop().run_in_executor(self._threads, file.write, piece)
            if not size:
                raise ApiError(400, "the body is empty")
            name = await asyncio.get_running_loop().run_in_executor(self._threads, self.store.keep, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return JSONResponse({"id": name, "object": "video", "bytes": size}, 201)

    async def _view(self, request: Request) -> ASGIApp:
        data = as_object(
            await self._json(request),
            "the body",
            {"model", "video_url", "images", "frames", "fps", "max_pixels", "retention_ratio", "prune"},
        )
        model, options = self._model(take_text(data, "model", "")), parse_options(data)
        url, images = take_text(data, "video_url", ""), data.get("images") is True
        if not url:
            raise ApiError(400, "give the video_url of a video or of a stream", "video_url")

        def job(key: VideoKey, clip: DecodedClip | None, emit: Emit) -> tuple[Generator[None, None, None], Hashable]:
            return self.engine.view(key, options, clip, emit), None

        async def seen() -> dict[str, Any]:
            if url.startswith("stream:"):
                stream = self.streams.get(url)
                await self._first_frames(stream)
                items = self._run(lambda emit: (self.engine.view_live(stream, emit), stream.name), dict)
            else:
                items = self._about_video(model, Media((url,)), options, job, dict)
            async with aclosing(items):
                found: dict[str, Any] = await anext_of(items)
                return found

        found = await unless_left(request.receive, seen())
        frames = found.pop("frames")
        if images:
            found["images"] = await asyncio.get_running_loop().run_in_executor(
                self._threads, _jpegs, frames, found["aspect"]
            )
        return JSONResponse(found)

    # Streams.

    async def _list_streams(self, request: Request) -> Response:
        described = [stream.describe() for stream in self.streams]
        capacity, load = self.settings.streams, round(self.streams.load, 4)
        return JSONResponse({"object": "list", "data": described, "capacity": capacity, "load": load})

    async def _add_stream(self, request: Request) -> Response:
        data = as_object(await self._json(request), "the body", {"source", "model", "window", "fps", "retention_ratio"})
        model = self._model(take_text(data, "model", ""))
        options = parse_options({**data, "frames": data.get("window")})
        stream = await self._open_stream(model, take_text(data, "source", ""), options, options.fps or 1.0)
        return JSONResponse(stream.describe(), 201)

    async def _one_stream(self, request: Request) -> Response:
        return JSONResponse(self.streams.get(request.path_params["name"]).describe())

    async def _remove_stream(self, request: Request) -> Response:
        stream = self.streams.get(request.path_params["name"])
        await self._on_worker(lambda: self.streams.remove(stream.name))
        return JSONResponse({"id": stream.name, "object": "stream", "deleted": True})

    async def _push_frame(self, request: Request) -> Response:
        stream = self.streams.get(request.path_params["name"])
        if stream.pushed is None:
            raise ApiError(400, f"{stream.name} reads its own source; open one of the source push:", "source")
        if not request.headers.get("content-type", "").lower().startswith("image/"):
            raise ApiError(415, "the body is an image: give its type")
        data = b"".join([piece async for piece in self._pieces(request, self.settings.max_frame)])
        frame = await self._in_thread(self._decode_frame, stream.model, data)
        if stream.over:
            raise ApiError(400, f"{stream.name} is over: {stream.error or 'it was closed'}", "source")
        return JSONResponse({"id": stream.name, "taken": stream.pushed.put(frame)}, 202)

    def _decode_frame(self, model: str, data: bytes) -> NDArray[np.uint8]:
        path = self.store.new_file()
        try:
            path.write_bytes(data)
            frames = self.decoders.decode({**self._media(model), "paths": [str(path)], "whole": True}).frames
            return frames.reshape(frames.shape[1:])
        finally:
            path.unlink(missing_ok=True)

    async def _watch_stream(self, request: Request) -> ASGIApp:
        body = dict(as_object(await self._json(request), "the body"))
        every, question = body.pop("every", 5.0), body.pop("question", None) or ""
        if isinstance(every, bool) or not isinstance(every, int | float) or not 0.1 <= every <= 86400:
            raise ApiError(400, "every is a number of seconds from 0.1 to 86400", "every")
        stream = self.streams.get(request.path_params["name"])
        part = {"type": "video_url", "video_url": {"url": stream.name}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
        chat = parse_chat({**body, "messages": messages}, self.settings.max_images)
        return EventStream(self._watch(stream, self._with_model(chat), float(every)), self.settings.send_seconds)

    async def _watch(self, stream: Stream, chat: ChatRequest, every: float) -> AsyncGenerator[str, None]:
        due = time.monotonic()
        while not self.draining:
            ended = stream.over  # what is said then is the last
            try:
                pieces, ending = await _all(None, self._ask(chat))
                yield as_json({"answer": "".join(pieces), "finish_reason": ending.finish, **ending.details})
            except ApiError as error:
                yield as_json(error.body)
                if error.status not in (429, 503):
                    break
            if ended:
                break
            due = max(due + every, time.monotonic())
            while time.monotonic() < due and not self.draining and not stream.over:
                await asyncio.sleep(min(0.25, max(due - time.monotonic(), 0.0)))
        yield "[DONE]"

    # What they share.

    async def _ask(self, chat: ChatRequest) -> AsyncGenerator[str | Ending, None]:
        """Pieces of an answer and its ending."""
        if isinstance(chat.json_schema, Mapping):  # the model's thread does not wait for the compiler
            compiled = await self._in_thread(self.engine.models[chat.model].compile_schema, chat.json_schema)
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

        def job(key: VideoKey, clip: DecodedClip | None, emit: Emit) -> tuple[Generator[None, None, None], Hashable]:
            name = key, chat.options.retention_ratio, chat.options.prune
            return self.engine.answer(chat, key, clip, emit), name

        async with aclosing(self._about_video(chat.model, chat.media, chat.options, job)) as items:
            async for item in items:
                yield item

    async def _first_frames(self, stream: Stream) -> None:
        """Waits for the first frames of a stream that was just opened; what has none then is an error of the engine."""
        deadline = time.monotonic() + self.settings.first_frame_seconds
        while not (stream.live.window.held or stream.over or self.draining) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)

    async def _ask_stream(self, chat: ChatRequest, stream: Stream) -> AsyncGenerator[str | Ending, None]:
        if stream.model != chat.model:
            raise ApiError(400, f"{stream.name} is read by {stream.model}, not by {chat.model}", "model")
        live = self._run(lambda emit: (self.engine.answer_live(chat, stream, emit), stream.name), Ending)
        async with aclosing(live):
            async for item in live:
                yield item

    async def _ask_camera(self, chat: ChatRequest, url: str) -> AsyncGenerator[str | Ending, None]:
        """Watches a camera for a while, as a stream of its own, and answers about that."""
        options = chat.options
        frames = options.frames or self.engine.models[chat.model].bundle.manifest.video.frames
        seconds = options.seconds or (frames / options.fps if options.fps else _WATCHED_S)
        if seconds > self.settings.watch_seconds:
            raise ApiError(400, f"a camera is watched for at most {self.settings.watch_seconds:g} s", "seconds")
        fps = options.fps or frames / seconds
        stream = await self._open_stream(chat.model, url, replace(options, frames=frames), fps)
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

    async def _open_stream(self, model: str, source: str, options: VideoOptions, fps: float) -> Stream:
        if options.frames is not None and options.frames > self.settings.max_frames:
            raise ApiError(400, f"a window has at most {self.settings.max_frames} frames", "window")
        frames = await self._in_thread(self._source, source, fps)
        opened = partial(
            open_live,
            self.engine.models[model],
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

    async def _about_video(
        self,
        model: str,
        media: Media,
        options: VideoOptions,
        job: Callable[[VideoKey, DecodedClip | None, Emit], tuple[Generator[None, None, None], Hashable]],
        last: type = Ending,
    ) -> AsyncGenerator[Any, None]:
        """What a job emits about a video, which is brought here and decoded unless it is known."""
        for again in (False, True):
            key, clip = await self._in_thread(self._bring, model, media, options, again)
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
                if self.engine.knows(key) and not again:
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
        llm, most = self.engine.models[model], self.settings.max_frames
        return {"bundle": str(llm.bundle.path.resolve()), "fixed": llm.frame_size, "most": most}

    async def _run(
        self, make: Callable[[Emit], tuple[Generator[None, None, None], Hashable]], last: type
    ) -> AsyncGenerator[Any, None]:
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

    async def _on_worker(self, call: Callable[[], Any]) -> Any:
        """The result of a call on the worker's thread."""

        def work(emit: Emit) -> Generator[None, None, None]:
            emit((call(),))
            yield

        async for item in self._run(lambda emit: (work(emit), None), tuple):
            return item[0]
        raise ApiError(500, "the server gave no result")

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
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

    def _with_model(self, chat: ChatRequest) -> ChatRequest:
        return replace(chat, model=self._model(chat.model))

    def _model(self, name: str) -> str:
        if not name:
            return next(iter(self.engine.models))
        if name not in self.engine.models:
            raise ApiError(404, f"there is no model {name[:60]!r}; there are {', '.join(self.engine.models)}", "model")
        return name

    async def _json(self, request: Request) -> Any:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body is JSON: say Content-Type: application/json")
        size = int(request.headers.get("content-length") or self.settings.max_body)
        if self._bodies + min(size, self.settings.max_body) > _BODIES * self.settings.max_body:
            raise ApiError(429, "too many large requests arrive; ask again", headers={"Retry-After": "2"})
        self._bodies += size
        try:
            pieces = [piece async for piece in self._pieces(request, self.settings.max_body)]
            body = b"".join(pieces)
            return _parsed(body) if len(body) < _SMALL else await self._in_thread(_parsed, body)
        finally:
            self._bodies -= size

    async def _pieces(self, request: Request, most: int) -> AsyncIterator[bytes]:
        """A request's body as it arrives, within the limits of size and time."""
        too_large = ApiError(413, f"the body has more than {most / 1e6:.0f} MB")
        if int(request.headers.get("content-length") or 0) > most:
            raise too_large
        deadline, size, body = time.monotonic() + self.settings.body_seconds, 0, request.stream()
        while True:
            try:
                left = max(deadline - time.monotonic(), 0.001)
                piece = await asyncio.wait_for(anext_of(body), left)
            except StopAsyncIteration:
                return
            except (asyncio.TimeoutError, TimeoutError) as error:
                raise ApiError(408, f"the body did not arrive within {self.settings.body_seconds:g} s") from error
            size += len(piece)
            if size > most:
                raise too_large
            yield piece


class _Guarded:
    """An endpoint as an ASGI application: the API key is asked for, and errors are OpenAI's."""

    def __init__(self, server: Server, endpoint: Callable[[Request], Any]) -> None:
        self._server, self._endpoint = server, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            if scope["path"].startswith("/v1/"):
                self._check_key(request)
            response = await self._endpoint(request)
        except (ClientLeftError, ClientDisconnect):
            return
        except ApiError as error:
            response = JSONResponse(error.body, error.status, error.headers)
        except Exception as error:
            found = ApiError.of(error)
            if found.status == 500:
                _log.error("a request failed", exc_info=error)
            response = JSONResponse(found.body, found.status)
        await response(scope, receive, send)

    def _check_key(self, request: Request) -> None:
        key = self._server.settings.api_key
        if key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", headers={"WWW-Authenticate": "Bearer"})


class _PageFile:
    """A file of the page, which loads nothing from elsewhere."""

    _HEADERS = MappingProxyType(
        {
            "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
    )

    def __init__(self, path: Path) -> None:
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await FileResponse(self._path, headers=dict(self._HEADERS))(scope, receive, send)


async def anext_of(items: Any) -> Any:
    """The next of an asynchronous iterator, as a coroutine."""
    return await items.__anext__()


async def _all(first: str | Ending | None, events: AsyncIterator[str | Ending]) -> tuple[list[str], Ending]:
    """All pieces of an answer, and its ending."""
    pieces = [first] if isinstance(first, str) else []
    if isinstance(first, Ending):
        return pieces, first
    async for item in events:
        if isinstance(item, Ending):
            return pieces, item
        pieces.append(item)
    raise ApiError(500, "the answer has no end")


async def _chunks(
    head: Mapping[str, Any], chat: ChatRequest, first: str | Ending, events: AsyncGenerator[str | Ending, None]
) -> AsyncGenerator[str, None]:
    """An answer as OpenAI's chunks."""

    def chunk(delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> str:
        choices: Sequence[Any] = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        found = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        return as_json({**found, "usage": None} if chat.include_usage else found)

    try:
        yield chunk({"role": "assistant", "content": ""})
        item: str | Ending = first
        while isinstance(item, str):
            yield chunk({"content": item})
            item = await anext_of(events)
        yield chunk({}, item.finish, tango=item.details)
        if chat.include_usage:
            yield as_json({**head, "object": "chat.completion.chunk", "choices": [], "usage": item.usage})
    except ApiError as error:  # the status is sent already
        yield as_json(error.body)
    yield "[DONE]"


def _parsed(body: bytes) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(body.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {first_line(error)}") from error


def _jpegs(frames: NDArray[np.uint8], aspect: float) -> list[str]:
    """Frames as data: URLs, in the aspect ratio of the video."""
    found = []
    for frame in frames:
        height, width = frame.shape[:2]
        size = math.sqrt(height * width)
        shown = (max(1, round(size * math.sqrt(aspect))), max(1, round(size / math.sqrt(aspect))))
        file = io.BytesIO()
        Image.fromarray(frame).resize(shown).save(file, "JPEG", quality=_QUALITY)
        found.append(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")
    return found


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}")
    return JSONResponse(found.body, error.status_code, error.headers)
