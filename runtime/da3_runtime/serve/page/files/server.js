// Requests to the server.

const KEY = "da3-api-key"; // the header, and the key's name in this tab's memory

let running = null; // stops the request that runs
let refused = () => {};
let changed = () => {};

export const isBusy = () => running !== null;
export const cancel = () => running?.abort();
export const key = () => sessionStorage.getItem(KEY);
export const keep = (text) => sessionStorage.setItem(KEY, text);
export const headers = () => (key() ? { [KEY]: key() } : {});

/** Call a function whenever the server refuses the key. */
export function onRefused(call) {
  refused = call;
}

/** Call a function whenever a request starts or ends. */
export function onBusy(call) {
  changed = call;
}

/** Do work that sends a request, and no other such work meanwhile; `cancel` ends it. */
export async function alone(work) {
  if (running) throw new Error("Wait for the request that runs.");
  running = new AbortController();
  changed();
  try {
    return await work(running.signal);
  } finally {
    running = null;
    changed();
  }
}

/** Send a job; returns its output, or throws the server's sentence. */
export async function ask(input, signal, onUpload = () => {}) {
  if (signal.aborted) throw new Error("Cancelled.");
  if (/[^\x20-\x7e]/.test(key() ?? "")) throw new Error("The API key has a letter that no header can carry.");
  const body = JSON.stringify({ input });
  const request = new XMLHttpRequest();
  signal.addEventListener("abort", () => request.abort());
  const answer = await new Promise((resolve, reject) => {
    request.open("POST", "runsync");
    request.setRequestHeader("content-type", "application/json");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onUpload(event.loaded / event.total);
    request.onload = () => resolve(request);
    request.onabort = () => reject(new Error("Cancelled."));
    request.onerror = () => reject(new Error("The server cannot be reached."));
    request.send(body);
  });
  let content = null;
  try {
    content = JSON.parse(answer.responseText);
  } catch {
    throw new Error(`The server answered with status ${answer.status}, and not with JSON.`);
  }
  if (answer.status === 401) refused();
  if (content.error) throw new Error(content.error);
  return content.output;
}

/** The models that the server has, or null if it does not say. */
export async function models() {
  const answer = await fetch("models", { headers: headers() }).catch(() => null);
  if (answer?.status === 401) refused();
  return answer?.ok ? (await answer.json()).models : null;
}

export const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

/** A file of a response; throws if it is not there. A file in the worker's bucket has an address instead. */
export function fileOf(output, name) {
  const stem = name === "preview" ? "image" : name;
  if (output[`${stem}_base64`]) return bytesOf(output[`${stem}_base64`]);
  if (output[`${stem}_url`]) throw new Error(`The response was too large; the file is at ${output[`${stem}_url`]}`);
  throw new Error("The model does not have this output.");
}
