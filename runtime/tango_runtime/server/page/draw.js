// Draws what was kept on the frames, segments on a time line, and the stages' times.

const SALIENT = "#ffb000", MERGED = "#409cff"; // on frames, which are neither dark nor light

// Draws a frame with a layer over it: "kept", "heat" or "none".
export function drawFrame(canvas, view, f, layer, width) {
  const image = view.pictures[f];
  canvas.width = width;
  canvas.height = Math.round((width * image.naturalHeight) / image.naturalWidth);
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (layer === "kept") drawKept(pen, view, f);
  if (layer === "heat") drawHeat(pen, view, f);
}

function cells(pen, view) {
  const [rows, columns] = view.grid;
  return { rows, columns, w: pen.canvas.width / columns, h: pen.canvas.height / rows };
}

function drawKept(pen, view, f) {
  const { rows, columns, w, h } = cells(pen, view);
  const kinds = view.kinds[f], gap = Math.max(0.5, Math.min(w, h) * 0.08);
  pen.fillStyle = "rgb(12 14 18 / .66)";
  for (let i = 0; i < rows * columns; i++) {
    if (kinds[i] === "0") pen.fillRect((i % columns) * w, Math.floor(i / columns) * h, w + 0.5, h + 0.5);
  }
  pen.lineWidth = Math.max(1, Math.min(w, h) * 0.12);
  for (let i = 0; i < rows * columns; i++) {
    if (kinds[i] === "0") continue;
    const x = (i % columns) * w, y = Math.floor(i / columns) * h;
    pen.strokeStyle = pen.fillStyle = kinds[i] === "2" ? MERGED : SALIENT;
    pen.strokeRect(x + gap, y + gap, w - 2 * gap, h - 2 * gap);
    if (kinds[i] === "2") {
      pen.beginPath();
      pen.arc(x + w / 2, y + h / 2, Math.min(w, h) * 0.16, 0, 2 * Math.PI);
      pen.fill();
    }
  }
}

function drawHeat(pen, view, f) {
  const { rows, columns, w, h } = cells(pen, view);
  for (let i = 0; i < rows * columns; i++) {
    const level = parseInt(view.salience[f].slice(2 * i, 2 * i + 2), 16) / 255;
    pen.fillStyle = `hsl(${55 - 55 * (1 - level)} 100% ${12 + 58 * level}% / .7)`;
    pen.fillRect((i % columns) * w, Math.floor(i / columns) * h, w + 0.5, h + 0.5);
  }
}

export function segmentOf(view, f) {
  const found = view.segments.findIndex(([begin, end]) => begin <= f && f < end);
  return found < 0 ? 0 : found;
}

const count = (kinds, kind) => kinds.split(kind).length - 1;

export function describe(view, f) {
  const kinds = view.kinds[f];
  return `${view.seconds[f].toFixed(1)} s: ${count(kinds, "1")} salient, ${count(kinds, "2")} merged of ${kinds.length}`;
}

// How many tokens are kept, in words, as a bar, and in the legend.
export function drawCounts(view) {
  const [salient, merged] = ["1", "2"].map((kind) => view.kinds.reduce((sum, kinds) => sum + count(kinds, kind), 0));
  const numbers = { salient, merged, dropped: view.total - salient - merged };
  for (const [name, number] of Object.entries(numbers)) document.getElementById(`${name}-count`).textContent = number;
  for (const name of ["salient", "merged"]) {
    document.querySelector(`#share .${name}`).style.width = `${(100 * numbers[name]) / view.total}%`;
  }
  const kept = document.createElement("b"), parts = view.segments.length, share = (100 * view.kept) / view.total;
  kept.textContent = view.kept;
  const rest = ` of ${view.total} video tokens (${share.toFixed(1)} %)${parts ? `, in ${parts} segment${parts > 1 ? "s" : ""}` : ""}`;
  document.getElementById("counts").replaceChildren(kept, rest);
}

export function clearCounts() {
  document.getElementById("counts").textContent = "No tokens yet";
  for (const number of document.querySelectorAll(".legend b")) number.textContent = "";
  for (const part of document.querySelectorAll("#share i")) part.style.width = "0";
}

export function drawTimeline(element, view, show) {
  const end = view.duration ?? view.seconds.at(-1) + 1;
  const segments = view.segments.length ? view.segments : [[0, view.seconds.length]];
  element.replaceChildren(
    ...segments.map(([begin, stop], i) => {
      const from = view.seconds[begin], to = stop < view.seconds.length ? view.seconds[stop] : end;
      const item = document.createElement("span"), button = document.createElement("button");
      item.setAttribute("role", "listitem");
      item.style.display = "flex";
      item.style.flex = `${Math.max(to - from, 0.01)} 1 0`;
      button.style.width = "100%";
      button.type = "button";
      button.className = `s${i % 4}`;
      button.textContent = `${from.toFixed(1)} – ${to.toFixed(1)} s`;
      button.setAttribute("aria-label", `Segment ${i + 1}, ${from.toFixed(1)} to ${to.toFixed(1)} seconds`);
      button.addEventListener("click", () => show(begin));
      item.append(button);
      return item;
    }),
  );
}

function duration(ms) {
  if (ms >= 10000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 100 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;
}

export function drawStages(element, stages) {
  const most = Math.max(...Object.values(stages), 0.001);
  element.replaceChildren(
    ...Object.entries(stages).flatMap(([name, ms]) => {
      const term = document.createElement("dt"), bar = document.createElement("dd"), value = document.createElement("dd");
      const fill = document.createElement("i");
      bar.className = "bar";
      fill.style.width = `${(100 * ms) / most}%`;
      bar.append(fill);
      term.textContent = name;
      value.textContent = duration(ms);
      return [term, bar, value];
    }),
  );
}
