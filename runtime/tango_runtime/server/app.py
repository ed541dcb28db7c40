"""The server's endpoints: OpenAI's chat completions, uploads, streams, health and metrics, and the page."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

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

from tango_runtime.server.answerer import Ending
from tango_runtime.server.bodies import Bodies
from tango_runtime.server.chat import ChatRequest, as_object, parse_chat, parse_options, take_text
from tango_runtime.server.errors import ApiError
from tango_runtime.server.events import ClientLeftError, EventStream, anext_of, as_json, unless_left
from tango_runtime.server.service import Service
from tango_runtime.server.settings import Settings
from tango_runtime.server.streams import Stream

_log = logging.getLogger("tango_runtime.server")

#: JPEG quality of the page's frames.
_QUALITY = 80


class Server:
    """A service behind HTTP.

    Args:
        service: What answers.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._began, self._bodies = int(time.time()), Bodies(service.settings, service.in_thread)

    def app(self) -> ASGIApp:
        """The ASGI application; its lifespan's end closes the server."""
        guarded = partial(_Guarded, self.service.settings)
        routes = [
            Route("/health", guarded(self._health), methods=["GET"]),
            Route("/ready", guarded(self._ready), methods=["GET"]),
            Route("/metrics", guarded(self._metrics), methods=["GET"]),
            Route("/v1/models", guarded(self._models), methods=["GET"]),
            Route("/v1/models/{name}", guarded(self._one_model), methods=["GET"]),
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
            CORSMiddleware, allow_origins=list(self.service.settings.origins), allow_methods=["*"], allow_headers=["*"]
        )

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.get_running_loop().run_in_executor(None, self.service.close)

        app = Starlette(routes=routes, middleware=[cors] if self.service.settings.origins else [], lifespan=lifespan)
        app.add_exception_handler(HTTPException, _http_error)
        return app

    # What is open to everyone.

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        return JSONResponse({"ready": not self.service.draining}, 503 if self.service.draining else 200)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # OpenAI's.

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(map(self._model, self.service.answerer.models))})

    async def _one_model(self, request: Request) -> Response:
        return JSONResponse(self._model(self.service.model(request.path_params["name"])))

    def _model(self, name: str) -> dict[str, Any]:
        manifest = self.service.answerer.models[name].bundle.manifest
        return {
            "id": name,
            "object": "model",
            "created": self._began,
            "owned_by": "tango-edge",
            "max_model_len": manifest.decoder.context,
            "frames": manifest.video.frames,
            "retention_ratio": manifest.params.retention_ratio,
        }

    async def _chat(self, request: Request) -> ASGIApp:
        chat = parse_chat(await self._bodies.json(request), self.service.settings.max_images)
        chat = self._with_model(chat)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
        events = self.service.ask(chat)
        try:
            first = await unless_left(request.receive, anext_of(events))
            if chat.stream:
                return EventStream(_chunks(head, chat, first, events), self.service.settings.send_seconds, events)
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
        path = self.service.store.new_file()
        try:
            with path.open("wb") as file:
                size = 0
                async for piece in self._bodies.pieces(request, self.service.settings.max_media):
                    size += len(piece)
                    await self.service.in_thread(file.write, piece)
            if not size:
                raise ApiError(400, "the body is empty")
            name = await self.service.in_thread(self.service.store.keep, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return JSONResponse({"id": name, "object": "video", "bytes": size}, 201)

    async def _view(self, request: Request) -> ASGIApp:
        data = as_object(
            await self._bodies.json(request),
            "the body",
            {"model", "video_url", "images", "frames", "fps", "max_pixels", "retention_ratio", "prune"},
        )
        model, options = self.service.model(take_text(data, "model", "")), parse_options(data)
        url, images = take_text(data, "video_url", ""), data.get("images") is True
        if not url:
            raise ApiError(400, "give the video_url of a video or of a stream", "video_url")

        found = await unless_left(request.receive, self.service.view(model, url, options))
        frames = found.pop("frames")
        if images:
            found["images"] = await self.service.in_thread(_jpegs, frames, found["aspect"])
        return JSONResponse(found)

    # Streams.

    async def _list_streams(self, request: Request) -> Response:
        described = [stream.describe() for stream in self.service.streams]
        capacity, load = self.service.settings.streams, round(self.service.streams.load, 4)
        return JSONResponse({"object": "list", "data": described, "capacity": capacity, "load": load})

    async def _add_stream(self, request: Request) -> Response:
        data = as_object(
            await self._bodies.json(request), "the body", {"source", "model", "window", "fps", "retention_ratio"}
        )
        model = self.service.model(take_text(data, "model", ""))
        options = parse_options({**data, "frames": data.get("window")})
        stream = await self.service.open_stream(model, take_text(data, "source", ""), options, options.fps or 1.0)
        return JSONResponse(stream.describe(), 201)

    async def _one_stream(self, request: Request) -> Response:
        return JSONResponse(self.service.streams.get(request.path_params["name"]).describe())

    async def _remove_stream(self, request: Request) -> Response:
        stream = self.service.streams.get(request.path_params["name"])
        await self.service.remove_stream(stream)
        return JSONResponse({"id": stream.name, "object": "stream", "deleted": True})

    async def _push_frame(self, request: Request) -> Response:
        stream = self.service.streams.get(request.path_params["name"])
        if stream.pushed is None:
            raise ApiError(400, f"{stream.name} reads its own source; open one of the source push:", "source")
        if not request.headers.get("content-type", "").lower().startswith("image/"):
            raise ApiError(415, "the body is an image: give its type")
        data = b"".join([piece async for piece in self._bodies.pieces(request, self.service.settings.max_frame)])
        frame = await self.service.in_thread(self.service.decode_frame, stream.model, data)
        if stream.over:
            raise ApiError(400, f"{stream.name} is over: {stream.error or 'it was closed'}", "source")
        return JSONResponse({"id": stream.name, "taken": stream.pushed.put(frame)}, 202)

    async def _watch_stream(self, request: Request) -> ASGIApp:
        body = dict(as_object(await self._bodies.json(request), "the body"))
        every, question = body.pop("every", 5.0), body.pop("question", None) or ""
        if isinstance(every, bool) or not isinstance(every, int | float) or not 0.1 <= every <= 86400:
            raise ApiError(400, "every is a number of seconds from 0.1 to 86400", "every")
        stream = self.service.streams.get(request.path_params["name"])
        part = {"type": "video_url", "video_url": {"url": stream.name}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
        chat = parse_chat({**body, "messages": messages}, self.service.settings.max_images)
        return EventStream(
            self._watch(stream, self._with_model(chat), float(every)), self.service.settings.send_seconds
        )

    async def _watch(self, stream: Stream, chat: ChatRequest, every: float) -> AsyncGenerator[str, None]:
        due = time.monotonic()
        while not self.service.draining:
            ended = stream.over  # what is said then is the last
            try:
                pieces, ending = await _all(None, self.service.ask(chat))
                yield as_json({"answer": "".join(pieces), "finish_reason": ending.finish, **ending.details})
            except ApiError as error:
                yield as_json(error.body)
                if error.status not in (429, 503):
                    break
            if ended:
                break
            due = max(due + every, time.monotonic())
            while time.monotonic() < due and not self.service.draining and not stream.over:
                await asyncio.sleep(min(0.25, max(due - time.monotonic(), 0.0)))
        yield "[DONE]"

    def _with_model(self, chat: ChatRequest) -> ChatRequest:
        return replace(chat, model=self.service.model(chat.model))


class _Guarded:
    """An endpoint as an ASGI application: the API key is asked for, and errors are OpenAI's."""

    def __init__(self, settings: Settings, endpoint: Callable[[Request], Any]) -> None:
        self._key, self._endpoint = settings.api_key, endpoint

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
        if self._key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key.encode()):
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
