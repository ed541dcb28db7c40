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

// Yields the chunks of a chat's answer.
export async function* chat(body, signal) {
  const options = { method: "POST", headers: headers("application/json"), body: JSON.stringify(body), signal };
  const response = await checked(await fetch("/v1/chat/completions", options));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
