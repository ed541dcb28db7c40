// The page: a video or a stream, questions about it, and what the decoder reads of it.

import { events, get, post, push, remove, setKey, upload } from "./api.js";
import { clearCounts, describe, drawCounts, drawFrame, drawStages, drawTimeline, segmentOf } from "./draw.js";

const $ = (id) => document.getElementById(id);
const RECORDED_SECONDS = 8, STREAM_MS = 1000, CAMERA_WIDTH = 640;

const state = {
  url: "",          // video:… or stream:…
  turns: [],        // [question, answer], of the chat so far
  view: null,       // what was kept
  stages: {},       // milliseconds of the stages, of the view and of the last answer
  answering: null,  // AbortController of the answer that is written
};

let streams = [];  // the open ones, as the server describes them
let live = null;   // the browser's camera while its frames are sent: { id, media, sending }

function say(text, error = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", error);
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function fail(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) $("access").open = true;
  say(error.message, true);
}

// The ratio is on a scale of logarithms: 1 % to 100 %.
function ratio() {
  return Math.round(10 ** (($("ratio").value / 100) * 2 - 2) * 1e4) / 1e4;
}

function options() {
  const frames = Number($("frames").value);
  return { model: $("model").value, retention_ratio: ratio(), ...(frames > 0 && !isStream() ? { frames } : {}) };
}

const isStream = () => state.url.startsWith("stream:");

// Whether there is something to see: a stream has no frames when it is opened.
const hasFrames = () => !isStream() || streams.some(({ id, frames_in_window: held }) => id === state.url && held);

// What is kept. While a view is on its way, the newest wish waits, and those between are left out.

let viewing = false, wished = false;

async function refresh() {
  wished = true;
  if (viewing) return;
  viewing = true;
  try {
    while (wished && state.url && hasFrames()) {  // each time: the video may be another by now, or none
      wished = false;
      await show();
    }
  } catch (error) {
    fail(error);
  } finally {
    viewing = false;
  }
}

async function show() {
  const url = state.url, known = state.view?.source === `${url} ${$("frames").value}` && !isStream();
  const view = await post("/v1/videos/view", { ...options(), video_url: url, images: !known });
  if (url !== state.url) return;
  view.pictures = known ? state.view.pictures : await Promise.all(view.images.map(picture));
  view.source = `${url} ${$("frames").value}`;
  if (!state.view) say("");
  state.view = view;
  state.stages = { ...state.stages, ...view.stages_ms };
  draw();
}

async function picture(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

function layer() {
  return document.querySelector("input[name=layer]:checked").value;
}

function draw() {
  const view = state.view;
  if (!view) return;
  drawCounts(view);
  const grid = $("grid");
  grid.querySelector(".none")?.remove();
  while (grid.children.length > view.pictures.length) grid.lastChild.remove();
  while (grid.children.length < view.pictures.length) grid.append(card(grid.children.length));
  [...grid.children].forEach((item, f) => {
    item.className = `s${segmentOf(view, f) % 4}`;
    drawFrame(item.querySelector("canvas"), view, f, layer(), 320);
    item.querySelector("span").textContent = `${view.seconds[f].toFixed(1)} s`;
    item.setAttribute("aria-label", `Frame ${f + 1}, ${describe(view, f)}`);
  });
  drawTimeline($("timeline"), view, (f) => grid.children[f].focus());
  drawStages($("stages"), state.stages);
}

function card(f) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(document.createElement("canvas"), document.createElement("span"));
  button.addEventListener("click", () => zoom(f));
  button.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) $("grid").children[f + by]?.focus();
  });
  return button;
}

let zoomed = 0;

function zoom(f) {
  zoomed = f;
  drawFrame($("large"), state.view, f, layer(), 900);
  $("caption").textContent = describe(state.view, f);
  if (!$("zoom").open) $("zoom").showModal();
}

$("zoom").addEventListener("keydown", (event) => {
  const f = zoomed + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? 0);
  if (f !== zoomed && state.view.pictures[f]) zoom(f);
});

$("ratio").addEventListener("input", () => {
  $("ratio-text").textContent = `${+(100 * ratio()).toPrecision(2)} %`;
  $("ratio").style.setProperty("--at", `${$("ratio").value}%`);
  refresh();
});
$("frames").addEventListener("change", refresh);
document.querySelectorAll("input[name=layer]").forEach((input) => input.addEventListener("change", draw));

// The video.

function choose(url, local) {
  state.url = url;
  state.view = null;
  state.stages = {};
  for (const id of ["grid", "timeline", "stages"]) $(id).replaceChildren();  // not the tokens of another video
  clearCounts();
  newChat();
  $("ask").disabled = !url;
  $("player").hidden = !local;
  $("hint").hidden = Boolean(local || live);
  $("again").hidden = !isStream();
  if (local) $("player").src = URL.createObjectURL(local);
  if (live && url !== live.id) close(live).catch(fail);
  drawStreams();
  refresh();
}

async function take(file) {
  if (!file) return;
  try {
    say(`sending ${file.name || "the recording"} …`);
    const id = await upload(file);
    choose(id, file);
    say(`${file.name || "the recording"}, ${(file.size / 1e6).toFixed(1)} MB`);
  } catch (error) {
    fail(error);
  }
}

$("file").addEventListener("change", () => take($("file").files[0]));
$("drop").addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});

$("camera").addEventListener("click", async () => {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640 } });
    const recorder = new MediaRecorder(stream), pieces = [];
    recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
    const ended = new Promise((resolve) => recorder.addEventListener("stop", resolve));
    $("player").hidden = false;
    $("player").srcObject = stream;
    $("player").play();
    recorder.start();
    for (let left = RECORDED_SECONDS; left; left--) {
      say(`recording, ${left} s left`);
      await pause(1000);
    }
    recorder.stop();
    await ended;
    $("player").srcObject = null;
    await take(new Blob(pieces, { type: recorder.mimeType.split(";")[0] }));
  } catch (error) {
    fail(error);
  } finally {
    stream?.getTracks().forEach((track) => track.stop());
  }
});

// Streams: of an address, or of the browser's camera, whose frames are sent one by one.

async function openStream(source) {
  const stream = await post("/v1/streams", { source, model: $("model").value, retention_ratio: ratio() });
  streams.push(stream);
  return stream.id;
}

// Items stay while their text changes: one that is replaced under the pointer loses its click.
function drawStreams() {
  const items = new Map([...$("streams").children].map((item) => [item.dataset.id, item]));
  for (const stream of streams) {
    const item = items.get(stream.id) ?? streamItem(stream);
    if (!items.delete(stream.id)) $("streams").append(item);
    item.classList.toggle("chosen", stream.id === state.url);
    item.querySelector("small").textContent = stream.error
      ?? `${stream.state}, ${stream.frames_encoded} frames, ${stream.frames_dropped} dropped, lag ${stream.lag_seconds.toFixed(1)} s`;
  }
  for (const gone of items.values()) gone.remove();
}

function streamItem(stream) {
  const item = document.createElement("li"), text = document.createElement("div");
  const [name, figures] = ["b", "small"].map((tag) => document.createElement(tag));
  item.dataset.id = stream.id;
  name.textContent = stream.source === "push:" ? "Camera of a browser" : stream.source;
  text.append(name, figures);
  item.append(text, action("Ask", "Ask about", stream, () => choose(stream.id, null)), action("Close", "Close", stream, close));
  return item;
}

function action(label, verb, stream, call) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  button.setAttribute("aria-label", `${verb} ${stream.source}`);
  button.addEventListener("click", () => Promise.resolve(call(stream)).catch(fail));
  return button;
}

async function close({ id }) {
  const sending = live?.id === id ? live.sending : null;
  if (sending) stopCamera();
  if (state.url === id) choose("", null);
  await sending;  // nothing is under way that would not find the stream
  while (viewing) await pause(20);
  await remove(`/v1/streams/${id}`);
  await listStreams();
}

async function listStreams() {
  streams = (await get("/v1/streams")).data;
  drawStreams();
}

$("open").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    say("opening …");
    choose(await openStream($("source").value.trim()), null);
    $("source").value = "";
    say("waiting for the first frames …");
  } catch (error) {
    fail(error);
  }
});

async function startCamera() {
  const media = await navigator.mediaDevices.getUserMedia({ video: { width: CAMERA_WIDTH } });
  try {
    const id = await openStream("push:");
    live = { id, media, sending: null };
  } catch (error) {
    media.getTracks().forEach((track) => track.stop());
    throw error;
  }
  $("live").textContent = "Stop camera";
  $("live").setAttribute("aria-pressed", "true");
  $("player").removeAttribute("src");
  $("player").srcObject = media;
  choose(live.id, null);
  say("waiting for the first frames …");
  $("player").hidden = false;
  $("player").play();
  const mine = live;
  live.sending = sendFrames(mine).catch((error) => {
    if (live === mine) stopCamera();
    fail(error);
  });
}

async function sendFrames(mine) {
  const canvas = document.createElement("canvas");
  while (live === mine) {
    const { videoWidth: width, videoHeight: height } = $("player");
    if (width) {
      canvas.width = Math.min(width, CAMERA_WIDTH);
      canvas.height = Math.round((canvas.width * height) / width);
      canvas.getContext("2d").drawImage($("player"), 0, 0, canvas.width, canvas.height);
      await push(mine.id, await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.85)));
    }
    await pause(width ? STREAM_MS : 50);
  }
}

function stopCamera() {
  live.media.getTracks().forEach((track) => track.stop());
  live = null;
  $("player").srcObject = null;
  $("player").hidden = true;
  $("hint").hidden = false;
  $("live").textContent = "Live camera";
  $("live").removeAttribute("aria-pressed");
}

$("live").addEventListener("click", () => (live ? close(live) : startCamera()).catch(fail));
addEventListener("pagehide", () => live && remove(`/v1/streams/${live.id}`));
setInterval(() => {
  if (document.hidden) return;
  if (streams.length) listStreams().catch(fail);
  if (isStream()) refresh();
}, STREAM_MS);

// The chat.

function newChat() {
  state.answering?.abort();
  state.turns = [];
  $("turns").replaceChildren();
}

// Asks a stream again and again; each answer is a turn of its own.
async function watch(question) {
  const leave = begin();
  try {
    const body = { ...options(), question, every: Number($("every").value) || 5 };
    for await (const found of events(`/v1/streams/${state.url}/answers`, body, leave.signal)) {
      say(found.error?.message ?? "", true);
      if (found.error) continue;
      const { answer, figures } = turn(question), { begin: from, end: to, lag_seconds: lag } = found.stream;
      answer.classList.remove("writing");
      answer.textContent = found.answer;
      figures.textContent = `${from.toFixed(1)} – ${to.toFixed(1)} s${lag == null ? "" : `, lag ${lag.toFixed(2)} s`}`;
      state.stages = { ...state.stages, ...found.stages_ms };
      drawStages($("stages"), state.stages);
      while ($("turns").children.length > 50) $("turns").firstChild.remove();
    }
  } catch (error) {
    fail(error);
  } finally {
    end(leave);
  }
}

function begin() {
  state.answering?.abort();
  $("stop").hidden = false;
  return (state.answering = new AbortController());
}

function end(leave) {
  if (state.answering !== leave) return;
  state.answering = null;
  $("stop").hidden = true;
}

function messages(question) {
  const video = { type: "video_url", video_url: { url: state.url } };
  const said = [...state.turns, [question, null]].flatMap(([asked, answer]) => [
    { role: "user", content: [{ type: "text", text: asked }] },
    ...(answer === null ? [] : [{ role: "assistant", content: answer }]),
  ]);
  said[0].content.unshift(video);
  return said;
}

function turn(question) {
  const item = document.createElement("li");
  const [asked, answer, figures] = ["asked", "answer", "figures"].map((name) => {
    const element = document.createElement("p");
    element.className = name;
    item.append(element);
    return element;
  });
  asked.textContent = question;
  answer.classList.add("writing");
  $("turns").append(item);
  $("turns").scrollTop = $("turns").scrollHeight;
  return { answer, figures };
}

async function ask(question) {
  const leave = begin(), { answer, figures } = turn(question);
  const began = performance.now();
  let first = 0;
  try {
    const body = { ...options(), messages: messages(question), stream: true };
    for await (const chunk of events("/v1/chat/completions", body, leave.signal)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices[0]?.delta.content;
      if (piece) {
        first ||= performance.now() - began;
        answer.textContent += piece;
      }
      if (chunk.tango) {
        state.stages = { ...state.stages, ...chunk.tango.stages_ms };
        const lag = chunk.tango.stream?.lag_seconds;
        figures.textContent = [
          `${chunk.tango.kept_tokens} of ${chunk.tango.video_tokens} video tokens`,
          `first word after ${first.toFixed(0)} ms`,
          ...(lag == null ? [] : [`lag ${lag.toFixed(2)} s`]),
        ].join(", ");
      }
    }
    state.turns.push([question, answer.textContent]);
    drawStages($("stages"), state.stages);
  } catch (error) {
    figures.textContent = error.name === "AbortError" ? "stopped" : "";
    fail(error);
  } finally {
    answer.classList.remove("writing");
    $("turns").scrollTop = $("turns").scrollHeight;
    end(leave);
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || !state.url) return;
  $("question").value = "";
  if (isStream() && $("watch").checked) watch(question);
  else ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => state.answering?.abort());
$("clear").addEventListener("click", newChat);

// The model, the key, the theme.

async function start() {
  try {
    const { data } = await get("/v1/models");
    const model = (name) => data.find(({ id }) => id === name);
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
    const reset = () => {
      const { frames, retention_ratio: share } = model($("model").value);
      $("frames").value = frames;
      $("ratio").value = Math.round((Math.log10(share) + 2) * 50);
      $("ratio").dispatchEvent(new Event("input"));
    };
    $("model").onchange = reset;
    reset();
    await listStreams();
    say("");
  } catch (error) {
    fail(error);
  }
}

$("key").addEventListener("change", () => {
  setKey($("key").value);
  start();
});
$("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
});
start();
