// The server's API: JSON, uploads, and answers as they come.

let key = "";

export function setKey(value) {
  key = value;
}

function headers(type) {
  return { ...(type ? { "Content-Type": type } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no JSON: the status says it */ }
  throw Object.assign(new Error(message), { status: response.status });
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function post(path, body, signal) {
  const options = { method: "POST", headers: headers("application/json"), body: JSON.stringify(body), signal };
  return (await checked(await fetch(path, options))).json();
}

export async function upload(file) {
  const type = file.type.startsWith("video/") || file.type === "image/gif" ? file.type : "application/octet-stream";
  const response = await fetch("/v1/videos", { method: "POST", headers: headers(type), body: file });
  return (await (await checked(response)).json()).id;
}

export async function remove(path) {
  return (await checked(await fetch(path, { method: "DELETE", headers: headers(), keepalive: true }))).json();
}

// Sends a frame of a stream of the source push:.
export async function push(stream, image) {
  const options = { method: "POST", headers: headers(image.type), body: image };
  return (await checked(await fetch(`/v1/streams/${stream}/frames`, options))).json();
}

// Yields the data of server-sent events; a failure that comes among them has an error.
export async function* events(path, body, signal) {
  const options = { method: "POST", headers: headers("application/json"), body: JSON.stringify(body), signal };
  const response = await checked(await fetch(path, options));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
