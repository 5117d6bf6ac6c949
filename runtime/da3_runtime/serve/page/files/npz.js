// Reads NumPy's archives: a ZIP file of arrays.

const KINDS = { "<f4": Float32Array, "<f8": Float64Array, "|u1": Uint8Array };

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The header of a .npy file is a Python dictionary, such as {'descr': '<f4', ..., 'shape': (2, 3), }.
function array(bytes) {
  const length = new DataView(bytes.buffer, bytes.byteOffset).getUint16(8, true);
  const header = new TextDecoder().decode(bytes.subarray(10, 10 + length));
  const kind = KINDS[/'descr': '([^']*)'/.exec(header)[1]];
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((n) => n.trim()).map(Number);
  return { shape, values: new kind(bytes.slice(10 + length).buffer) };
}

/** The arrays of an archive by name, each with `shape` and `values`. */
export async function readNpz(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let end = bytes.length - 22;
  while (view.getUint32(end, true) !== 0x06054b50) end -= 1;
  const arrays = {};
  let at = view.getUint32(end + 16, true);
  for (let count = view.getUint16(end + 10, true); count > 0; count -= 1) {
    const [method, size] = [view.getUint16(at + 10, true), view.getUint32(at + 20, true)];
    const [name, extra, comment] = [28, 30, 32].map((place) => view.getUint16(at + place, true));
    const local = view.getUint32(at + 42, true);
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const file = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + name));
    const data = bytes.subarray(start, start + size);
    arrays[file.replace(/\.npy$/, "")] = array(method === 8 ? await inflated(data) : data);
    at += 46 + name + extra + comment;
  }
  return arrays;
}
