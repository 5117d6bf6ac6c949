// The chosen photos: { file } or { url }, each with a name.

const $ = (id) => document.getElementById(id);

export const photos = [];

let changed = () => {};

/** Call a function whenever a photo was added or removed. */
export function onChange(call) {
  changed = call;
}

export function add(more) {
  photos.push(...more);
  list();
}

function list() {
  $("photos").replaceChildren(
    ...photos.map((photo, index) => {
      const item = document.createElement("li");
      if (photo.file) {
        const image = document.createElement("img");
        image.alt = "";
        image.src = URL.createObjectURL(photo.file);
        image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
        item.append(image);
      }
      const remove = document.createElement("button");
      remove.type = "button";
      remove.textContent = "Remove";
      remove.setAttribute("aria-label", `Remove ${photo.name}`);
      remove.onclick = () => {
        photos.splice(index, 1);
        list();
      };
      item.append(photo.name, remove);
      return item;
    }),
  );
  $("together").hidden = photos.length < 2;
  changed();
}

export const ofFiles = (files) => [...files].map((file) => ({ file, name: file.name || "photo" }));

/** Add the photo whose address was typed. */
export function addUrl() {
  const url = $("url").value.trim();
  if (!url) return;
  if (!$("url").reportValidity()) return;
  add([{ url, name: new URL(url).pathname.split("/").pop() || "photo" }]);
  $("url").value = "";
}

function text(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

/** The fields of a request that hold these photos. */
export async function imagesOf(chosen) {
  const each = await Promise.all(
    chosen.map(async (photo) => (photo.url ? { image_url: photo.url } : { image_base64: await text(photo.file) })),
  );
  return each.length > 1 ? { images: each } : each[0];
}
