// What ran, in words, and the same request in other languages.

import { key } from "./server.js";
import { UNITS } from "./result.js";

const $ = (id) => document.getElementById(id);
const PARITY = {
  verified: "verified: the engine file was measured against the original network",
  unverified: "unverified: nothing measured what ran",
};

/** Fill in the section about what ran. */
export function showFacts(shown) {
  const { output, views, width, height } = shown;
  const rows = [
    ["Model", output.model_id],
    ["License of its checkpoint", output.license],
    ["Backend", output.backend],
    ["Precision", output.precision],
    ["Parity", PARITY[output.parity]],
    ["Network saw", `${views.length > 1 ? `${views.length} photos of ` : ""}${width} x ${height} pixels`],
    ...views.map((view, index) => [
      views.length > 1 ? `Depth of ${shown.chosen[index].name}` : "Depth",
      `${view.min_depth.toPrecision(4)} to ${view.max_depth.toPrecision(4)} ${UNITS[view.unit]}`,
    ]),
  ];
  if (views[0].focal_source) rows.push(["Focal length from", views[0].focal_source]);
  if (output.reference !== undefined) rows.push(["Reference photo", output.reference ?? "none"]);
  $("facts").replaceChildren(
    ...rows.flatMap(([name, value]) => {
      const [term, text] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, text.textContent] = [name, value];
      return [term, text];
    }),
  );
  const warnings = new Set([...output.warnings, ...views.flatMap((view) => view.warnings)]);
  // This page asks for every layer, and shows those that the model has.
  const told = [...warnings].filter((sentence) => !sentence.startsWith("The model does not have"));
  $("warnings").hidden = !told.length;
  $("warnings").replaceChildren(
    ...told.map((sentence) => Object.assign(document.createElement("li"), { textContent: sentence })),
  );
  $("timings").tBodies[0].replaceChildren(
    ...Object.entries(output.timings_ms).map(([stage, ms]) => {
      const row = document.createElement("tr");
      const [name, time] = [document.createElement("td"), document.createElement("td")];
      [name.textContent, time.textContent] = [stage, ms.toFixed(1)];
      row.append(name, time);
      return row;
    }),
  );
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Fill in the section with the same request. */
export function showRequests(shown) {
  const { chosen, fields } = shown;
  const address = new URL("runsync", document.baseURI).href;
  const all = { outputs: ["preview", "depth_png16"], ...fields };
  const curl = [];
  if (chosen.every((photo) => photo.file) && chosen.length) {
    const query = new URLSearchParams({ ...all, outputs: all.outputs.join(",") }).toString().replaceAll("%2C", ",");
    const name = (photo) => photo.name.replaceAll("\\", "\\\\").replaceAll('"', '\\"');
    const files = chosen.map((photo) => `  -F ${quoted(`file=@"${name(photo)}"`)}`);
    curl.push(`curl ${quoted(`${address}?${query}`)}`, ...files);
  } else {
    const input = { ...all, ...Object.assign({}, ...(chosen.length > 1 ? [{ images: chosen.map(named) }] : chosen.map(named))) };
    curl.push(`curl ${quoted(address)} -H 'content-type: application/json'`, `  --data-binary ${quoted(JSON.stringify({ input }))}`);
  }
  if (key()) curl.push(`  -H "da3-api-key: $DA3_API_KEY"`);
  $("curl").textContent = curl.join(" \\\n");

  const json = (value) => JSON.stringify(value, null, 4).replaceAll("true", "True").replaceAll("false", "False");
  const source = (photo) => (photo.url ? `{"image_url": ${JSON.stringify(photo.url)}}` : `{"image_base64": text(${JSON.stringify(photo.name)})}`);
  const sources = chosen.length > 1 ? `{"images": [${chosen.map(source).join(", ")}]}` : source(chosen[0]);
  $("python").textContent = [
    "import base64",
    ...(key() ? ["import os"] : []),
    "",
    "import requests",
    "",
    "",
    "def text(path):",
    '    with open(path, "rb") as file:',
    "        return base64.b64encode(file.read()).decode()",
    "",
    "",
    `fields = ${json(all)}`,
    `job = {"input": {**fields, **${sources}}}`,
    ...(key() ? [`headers = {"da3-api-key": os.environ["DA3_API_KEY"]}`] : ["headers = {}"]),
    `answer = requests.post(${JSON.stringify(address)}, json=job, headers=headers, timeout=300).json()`,
    'print(answer.get("error") or answer["output"].keys())',
  ].join("\n");
}

const named = (photo) => (photo.url ? { image_url: photo.url } : { image_base64: `(${photo.name} in Base64)` });
