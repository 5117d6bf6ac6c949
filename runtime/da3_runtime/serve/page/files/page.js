// The page: its form, its files and its points.

import { showFacts, showRequests } from "./facts.js";
import { add, addUrl, imagesOf, ofFiles, onChange, photos } from "./photos.js";
import { current, divide, loadColors, move, paint, point, show } from "./result.js";
import { alone, ask, cancel, fileOf, isBusy, keep, key, models, onBusy, onRefused } from "./server.js";

const $ = (id) => document.getElementById(id);
// Name and file ending of each output, as the command line has them.
const OUTPUTS = {
  preview: ["Gray preview", ".png"],
  color: ["Color preview", ".color.png"],
  depth_png16: ["Depth, 16-bit PNG", ".depth.png"],
  depth_npz: ["Depth, NumPy", ".depth.npz"],
  depth_tiff: ["Depth, TIFF", ".depth.tiff"],
  depth_exr: ["Depth, EXR", ".depth.exr"],
  confidence: ["Confidence", ".confidence.png"],
  sky: ["Sky", ".sky.png"],
  camera: ["Camera", ".camera.json"],
  glb: ["Points, GLB", ".glb"],
  ply: ["Points, PLY", ".ply"],
  colmap: ["Points, COLMAP", ".colmap.zip"],
  scene_npz: ["All arrays, NumPy", ".scene.npz"],
};

/** The fields of a request, without the images. */
function options() {
  const model = $("model").selectedOptions[0];
  const fields = {};
  if (model && !model.defaultSelected) {
    Object.assign(fields, { model_id: model.dataset.model, use_sdt_head: model.dataset.head === "sdt" });
  }
  if ($("resolution").value) fields.processing_res = Number($("resolution").value);
  if ($("focal").value) fields.focal_length_px = Number($("focal").value);
  return fields;
}

let arePointsOld = false; // whether the points were asked for again while a request ran

/** Allow to start what can be started. */
function allow() {
  $("run").disabled = !photos.length || isBusy();
  $("cancel").hidden = !isBusy();
  if (arePointsOld && !isBusy()) points();
}

function needKey() {
  $("key-row").hidden = false;
}

function fail(id, error) {
  $(id).textContent = error.message;
  $(id).hidden = false;
}

async function run(event) {
  event.preventDefault();
  if (isBusy() || !photos.length) return;
  const chosen = [...photos];
  const fields = options();
  $("error").hidden = true;
  arePointsOld = false;
  const start = performance.now();
  const clock = setInterval(() => {
    if (!$("progress").hidden) return;
    $("status").textContent = `Computing: ${((performance.now() - start) / 1000).toFixed(0)} s`;
  }, 500);
  try {
    $("status").textContent = "Reading the photos";
    const output = await alone(async (signal) => {
      const outputs = { outputs: ["scene_npz", "sky", "camera"], output_size: "model" };
      return ask({ ...(await imagesOf(chosen)), ...fields, ...outputs }, signal, (share) => {
        $("progress").hidden = share === 1;
        $("progress").value = share;
        $("status").textContent = share < 1 ? `Uploading: ${(100 * share).toFixed(0)} %` : "Computing";
      });
    });
    await show(output, chosen, fields);
    for (const id of ["points", "points-error", "download-error"]) $(id).hidden = true;
    $("points-status").textContent = $("download-status").textContent = "";
    showFacts(current());
    showRequests(current());
    $("status").textContent = `Done in ${((performance.now() - start) / 1000).toFixed(1)} s`;
    $("result").scrollIntoView({ block: "start" });
  } catch (error) {
    $("status").textContent = "";
    fail("error", error);
  } finally {
    clearInterval(clock);
    $("progress").hidden = true;
    await listModels();
  }
}

// Files and points.

/** The response to the same request with other outputs. */
async function more(names, size, wanted = {}) {
  const { chosen, fields } = current();
  return alone(async (signal) =>
    ask({ ...(await imagesOf(chosen)), ...fields, ...wanted, outputs: names, output_size: size }, signal),
  );
}

/** What the page's own controls say about points and colors. */
const asShown = () => ({ points_confidence: Number($("unsure").value), color_map: $("colors").value });

async function download(name) {
  const [title, ending] = OUTPUTS[name];
  $("download-error").hidden = true;
  $("download-status").textContent = `${title} ...`;
  try {
    const { chosen } = current();
    const output = await more([name], "original", asShown());
    // Of a scene, each photo has its own, or all have one together.
    const isTogether = output.views && (`${name}_base64` in output || `${name}_url` in output);
    const parts = output.views && !isTogether ? output.views : [output];
    parts.forEach((part, index) => {
      const content = name === "camera" ? JSON.stringify(part.camera, null, 2) : fileOf(part, name);
      const stem = isTogether ? "scene" : chosen[index].name.replace(/\.[^.]*$/, "");
      save(content, `${stem}${ending}`);
    });
    $("download-status").textContent = `${title}: saved`;
  } catch (error) {
    $("download-status").textContent = "";
    fail("download-error", error);
  }
}

function save(content, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content]));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function points() {
  arePointsOld = isBusy();
  if (arePointsOld) return;
  $("points-error").hidden = true;
  $("show-points").disabled = true;
  $("points-status").textContent = "Computing ...";
  try {
    const shown = current();
    const glb = fileOf(await more(["glb"], "model", asShown()), "glb");
    if (shown !== current()) return;
    const { showPoints } = await import("./points.js");
    $("points").hidden = false;
    await showPoints($("points"), glb.buffer);
    $("points-status").textContent = "Drag to turn, scroll to zoom.";
  } catch (error) {
    $("points").hidden = true;
    $("points-status").textContent = "";
    fail("points-error", error);
  } finally {
    $("show-points").disabled = false;
  }
}

// The server's models and color maps.

async function listModels() {
  const rows = await models();
  if (!rows) return;
  const before = $("model").value;
  const groups = { loaded: "Loaded", engine: "Engine at hand", other: "May have to be downloaded" };
  $("model").replaceChildren(
    ...Object.entries(groups).flatMap(([state, label]) => {
      const group = Object.assign(document.createElement("optgroup"), { label });
      for (const row of rows.filter((each) => each.state === state)) {
        const head = row.head === "dpt" ? "" : `, ${row.head} head`;
        const option = new Option(`${row.model_id}${head}: ${row.unit}, ${row.license}`, `${row.model_id} ${row.head}`, row.is_default, row.is_default);
        Object.assign(option.dataset, { model: row.model_id, head: row.head });
        group.append(option);
      }
      return group.children.length ? [group] : [];
    }),
  );
  if (before && [...$("model").options].some((option) => option.value === before)) $("model").value = before;
}

/** Connect the controls. */
function start() {
  onChange(allow);
  onBusy(allow);
  onRefused(needKey);
  $("form").onsubmit = run;
  $("cancel").onclick = () => cancel();
  $("files").onchange = () => {
    add(ofFiles($("files").files));
    $("files").value = "";
  };
  $("add").onclick = addUrl;
  $("url").onkeydown = (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    addUrl();
  };
  document.ondragover = (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  };
  document.ondragleave = () => $("drop").classList.remove("over");
  document.ondrop = (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    add(ofFiles(event.dataTransfer.files));
  };
  document.onpaste = (event) => add(ofFiles(event.clipboardData.files));
  $("key").value = key() ?? "";
  $("key").oninput = () => keep($("key").value.trim());
  $("key").onchange = listModels;
  $("compare").onpointermove = $("compare").onpointerdown = point;
  $("compare").onkeydown = move;
  $("divide").oninput = divide;
  for (const id of ["layer", "colors", "near", "far"]) $(id).oninput = paint;
  $("show-points").onclick = points;
  $("unsure").oninput = () => ($("unsure-share").textContent = `${$("unsure").value} %`);
  $("unsure").onchange = () => $("points").hidden || points();
  $("downloads").replaceChildren(
    ...Object.entries(OUTPUTS).map(([name, [title]]) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: title });
      button.onclick = () => download(name);
      return button;
    }),
  );
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.onclick = async () => {
      const code = $(button.dataset.copy);
      getSelection().selectAllChildren(code);
      // Browsers offer the clipboard to pages over HTTPS, and of the own machine.
      const written = navigator.clipboard?.writeText(code.textContent);
      const copied = written ? await written.then(() => true, () => false) : false;
      $("copied").textContent = copied ? "Copied" : "Selected: copy it with the keyboard";
    };
  }
  listModels();
  loadColors().catch(() => {}); // the first result tries again, and says so
}

start();
