// Requests to the server.

const KEY = "da3-api-key"; // the header, and the key's name in this tab's memory

let running = null;
let refused = () => {};

export const isBusy = () => running !== null;
export const cancel = () => running?.abort();
export const key = () => sessionStorage.getItem(KEY);
export const keep = (text) => sessionStorage.setItem(KEY, text);
export const headers = () => (key() ? { [KEY]: key() } : {});

/** Call a function whenever the server refuses the key. */
export function onRefused(call) {
  refused = call;
}

/** Send a job; returns its output, or throws the server's sentence. */
export async function ask(input, onUpload = () => {}) {
  const body = JSON.stringify({ input });
  const request = new XMLHttpRequest();
  running = request;
  try {
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
  } finally {
    running = null;
  }
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
