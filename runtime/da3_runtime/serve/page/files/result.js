// The result: photo and depth side by side, and the values under the pointer.

import { readNpz } from "./npz.js";
import { bytesOf, fileOf } from "./server.js";

const $ = (id) => document.getElementById(id);

export const UNITS = { m: "m", relative: "(relative)", cameras: "(unit of the cameras)" };

let maps = {}; // name of a color map -> 256 colors, as one array of bytes
let shown = null;

/** What is shown: the response, the photos and fields of its request, and the arrays of each view. */
export const current = () => shown;

/** Show a response. */
export async function show(output, chosen, fields) {
  if (!Object.keys(maps).length) await loadColors();
  const arrays = await readNpz(fileOf(output, "scene_npz"));
  const [, height, width] = arrays.depth.shape;
  const size = height * width;
  const views = output.views ?? [output];
  shown = {
    output,
    chosen,
    fields,
    width,
    height,
    index: 0,
    point: null,
    views: await Promise.all(
      views.map(async (view, index) => {
        const part = (array, each = size) => array?.values.subarray(index * each, (index + 1) * each);
        const layers = { depth: part(arrays.depth) };
        if (arrays.conf) layers.confidence = part(arrays.conf);
        if (view.sky_base64) layers.sky = await skyOf(view.sky_base64, width, height);
        return { ...view, layers, image: part(arrays.image, 3 * size) };
      }),
    ),
  };
  $("views").replaceChildren(...(views.length > 1 ? views.map((_, index) => viewButton(index)) : []));
  $("result").hidden = false;
  await select(0);
}

async function skyOf(base64, width, height) {
  const picture = await createImageBitmap(new Blob([bytesOf(base64)], { type: "image/png" }));
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(picture, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  return Float32Array.from({ length: width * height }, (_, i) => data[4 * i] / 255);
}

function viewButton(index) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = shown.chosen[index].name;
  button.onclick = () => select(index);
  return button;
}

async function select(index) {
  shown.index = index;
  const { width, height, chosen, views } = shown;
  [...$("views").children].forEach((button, i) => button.setAttribute("aria-pressed", i === index));
  $("layer").replaceChildren(...Object.keys(views[index].layers).map((name) => new Option(name)));
  const photo = $("photo").getContext("2d");
  let picture = null;
  let crop = null;
  if (chosen[index].file) {
    // A browser cannot show every photo that the server reads, such as HEIC.
    picture = await createImageBitmap(chosen[index].file).catch(() => null);
    crop = picture && cropOf(views[index], picture, width / height);
  }
  if (shown.index !== index) return;
  if (crop) {
    const scale = Math.min(1, 1600 / crop[2]);
    [photo.canvas.width, photo.canvas.height] = [crop[2] * scale, crop[3] * scale].map(Math.round);
    photo.drawImage(picture, ...crop, 0, 0, photo.canvas.width, photo.canvas.height);
  } else {
    [photo.canvas.width, photo.canvas.height] = [width, height];
    const pixels = photo.createImageData(width, height);
    for (let i = 0; i < width * height; i += 1) {
      pixels.data.set(views[index].image.subarray(3 * i, 3 * i + 3), 4 * i);
      pixels.data[4 * i + 3] = 255;
    }
    photo.putImageData(pixels, 0, 0);
  }
  // The network's input is rounded to multiples of 14 pixels: the depth takes the photo's shape.
  $("depth").style.aspectRatio = `${photo.canvas.width} / ${photo.canvas.height}`;
  paint();
  read();
}

/** The part of a picture that the maps cover: left, top, width, height. */
function cropOf(view, picture) {
  if (!view.crop) return [0, 0, picture.width, picture.height];
  // The crop is in pixels at the maps' scale, around the middle: one of its sides is the whole picture's.
  const [left, top, width, height] = view.crop;
  const [whole, tall] = [width + 2 * left, height + 2 * top];
  return [
    (left / whole) * picture.width, (top / tall) * picture.height,
    (width / whole) * picture.width, (height / tall) * picture.height,
  ];
}

/** Color the chosen layer. */
export function paint() {
  const { width, height, index, views } = shown;
  const layer = $("layer").value;
  const values = views[index].layers[layer];
  // Nearness, as the previews show it; confidence and sky as they are.
  const level = layer === "depth" ? (value) => 1 / Math.max(value, 1e-6) : (value) => value;
  const sorted = Float32Array.from(values, level).sort();
  const at = (percent) => sorted[Math.round(((sorted.length - 1) * percent) / 100)];
  const [first, last] = [Number($("near").value), Number($("far").value)].sort((a, b) => a - b);
  // The nearest color is that of the largest nearness.
  const [low, high] = layer === "depth" ? [at(100 - last), at(100 - first)] : [at(first), at(last)];
  const range = high > low ? high - low : 1;
  const table = maps[$("colors").value];
  const context = $("depth").getContext("2d");
  [context.canvas.width, context.canvas.height] = [width, height];
  const pixels = context.createImageData(width, height);
  for (let i = 0; i < values.length; i += 1) {
    const step = Math.max(0, Math.min(255, Math.floor(((level(values[i]) - low) / range) * 256)));
    pixels.data.set(table.subarray(3 * step, 3 * step + 3), 4 * i);
    pixels.data[4 * i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  const bar = $("bar").getContext("2d");
  const steps = bar.createImageData(256, 1);
  for (let i = 0; i < 256; i += 1) steps.data.set([...table.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  bar.putImageData(steps, 0, 0);
  const words = (value) => (layer === "depth" ? 1 / value : value).toPrecision(3);
  [$("low").textContent, $("high").textContent] = [words(low), words(high)];
  divide();
}

/** Show the photo left of the slider, and the depth right of it. */
export function divide() {
  $("depth").style.clipPath = `inset(0 0 0 ${$("divide").value}%)`;
}

const inUnit = (value) => `${value.toPrecision(5)} ${UNITS[shown.views[shown.index].unit]}`;

/** Say the values at the point that the pointer or the arrow keys chose. */
function read() {
  const { point, width, height, index, views } = shown;
  $("cross").hidden = point === null;
  if (point === null) return;
  const [x, y] = [Math.min(width - 1, Math.floor(point[0] * width)), Math.min(height - 1, Math.floor(point[1] * height))];
  $("cross").style.left = `${100 * point[0]}%`;
  $("cross").style.top = `${100 * point[1]}%`;
  const { depth, confidence, sky } = views[index].layers;
  const at = y * width + x;
  const words = [`Depth ${inUnit(depth[at])}`];
  if (confidence) words.push(`confidence ${confidence[at].toPrecision(3)}`);
  if (sky) words.push(sky[at] > 0.5 ? "sky" : "not sky");
  $("reading").textContent = `${words.join(", ")}, at column ${x}, row ${y} of ${width} x ${height}`;
}

/** Read the values at a point, in shares of the picture's width and height. */
function readAt(across, down) {
  shown.point = [across, down].map((share) => Math.min(0.9999, Math.max(0, share)));
  read();
}

/** Choose the point under the pointer. */
export function point(event) {
  if (!shown) return;
  const box = $("compare").getBoundingClientRect();
  readAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
}

/** Move the point with the arrow keys; with Shift ten pixels at once. */
export function move(event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step || !shown) return;
  event.preventDefault();
  const [x, y] = shown.point ?? [0.5, 0.5];
  const far = event.shiftKey ? 10 : 1;
  readAt(x + (far * step[0]) / shown.width, y + (far * step[1]) / shown.height);
}

/** Load the color maps. */
export async function loadColors() {
  const answer = await fetch("color-maps").catch(() => null);
  if (!answer?.ok) throw new Error("The server does not send its color maps; try again.");
  const tables = await answer.json();
  maps = Object.fromEntries(Object.entries(tables).map(([name, base64]) => [name, bytesOf(base64)]));
  $("colors").replaceChildren(...Object.keys(maps).map((name) => new Option(name)));
}
