#!/usr/bin/env node
// Depth of a photo from a DA3 endpoint. Needs Node 18 or newer and nothing else.
//
// client.mjs runsync ADDRESS PHOTO [OUT]          one request to a queue endpoint, or to your own server
// client.mjs run ADDRESS PHOTO [OUT]              in two steps: /run, then /status until it is done
// client.mjs load-balancing ADDRESS PHOTO [OUT]   a load-balancing endpoint: waits for /ping first
//
// RUNPOD_API_KEY is the account's key, DA3_API_KEY the worker's; MODEL_ID names another model than
// the worker's. The preview is written to OUT, depth.png.

import { readFile, writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";

const PATHS = { runsync: "/runsync", run: "/run", "load-balancing": "/runsync" };
const WAITING = ["IN_QUEUE", "IN_PROGRESS", "RUNNING"];
// Milliseconds to wait for a worker to be ready, and for a job to end.
const PATIENCE = 600_000;
const { RUNPOD_API_KEY, DA3_API_KEY, MODEL_ID } = process.env;

/** HTTP status and JSON of the response; null if it is not JSON. */
async function ask(url, body) {
  const headers = { "Content-Type": "application/json" };
  if (RUNPOD_API_KEY) headers.Authorization = `Bearer ${RUNPOD_API_KEY}`;
  if (DA3_API_KEY) headers["da3-api-key"] = DA3_API_KEY;
  const method = body === undefined ? "GET" : "POST";
  const response = await fetch(url, { method, headers, body: body && JSON.stringify(body) });
  const text = await response.text();
  try {
    return [response.status, JSON.parse(text)];
  } catch {
    return [response.status, null];
  }
}

/** Wait until a worker of a load-balancing endpoint has loaded its model. */
async function waitUntilReady(address) {
  for (const end = Date.now() + PATIENCE; Date.now() < end; await sleep(1000)) {
    if ((await ask(`${address}/ping`))[0] === 200) return;
  }
  throw new Error("no worker was ready in time");
}

/** The `output` of a completed job. */
async function depth(kind, address, photo) {
  const input = { image_base64: (await readFile(photo)).toString("base64") };
  if (MODEL_ID) input.model_id = MODEL_ID;
  if (kind === "load-balancing") await waitUntilReady(address);
  else if (DA3_API_KEY) input.api_key = DA3_API_KEY; // a queue passes no headers to the worker
  let [status, job] = await ask(address + PATHS[kind], { input });
  for (const end = Date.now() + PATIENCE; WAITING.includes(job?.status) && Date.now() < end; ) {
    await sleep(500);
    [status, job] = await ask(`${address}/status/${job.id}`);
  }
  if (job?.status !== "COMPLETED") throw new Error(`HTTP ${status}: ${job?.error ?? JSON.stringify(job)}`);
  return job.output;
}

const [kind, address, photo, out = "depth.png"] = process.argv.slice(2);
if (!Object.hasOwn(PATHS, kind ?? "") || !photo) {
  console.error("usage: client.mjs runsync|run|load-balancing ADDRESS PHOTO [OUT]");
  process.exit(1);
}
try {
  const output = await depth(kind, address.replace(/\/+$/, ""), photo);
  const preview = output.image_url // the response was too large, so the preview is in a bucket
    ? Buffer.from(await (await fetch(output.image_url)).arrayBuffer())
    : Buffer.from(output.image_base64, "base64");
  await writeFile(out, preview);
  console.log(`${out}: unit ${output.unit}, min ${output.min_depth}, max ${output.max_depth}`);
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
}
