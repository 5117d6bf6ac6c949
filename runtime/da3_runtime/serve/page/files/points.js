// The 3D view: shows a GLB file and turns it.

import { Color, GLTFLoader, OrbitControls, PerspectiveCamera, Scene, Vector3, WebGLRenderer } from "./three.js";

let renderer = null;
let controls = null;
let watcher = null;
let old = null;

/** The median distance of a cloud's points from a place, of a sample of them. */
function median(cloud, place) {
  const positions = cloud.geometry.getAttribute("position");
  const step = Math.ceil(positions.count / 1000);
  const distances = [];
  for (let i = 0; i < positions.count; i += step) {
    distances.push(new Vector3().fromBufferAttribute(positions, i).applyMatrix4(cloud.matrixWorld).distanceTo(place));
  }
  return distances.sort((a, b) => a - b)[distances.length >> 1];
}

/** Show the points and cameras of a GLB file; throws if the browser has no WebGL. */
export async function showPoints(canvas, glb) {
  const { scene: content, cameras } = await new GLTFLoader().parseAsync(glb, "");
  renderer ??= new WebGLRenderer({ canvas, antialias: true });
  controls?.dispose();
  watcher?.disconnect();
  old?.traverse((part) => {
    part.geometry?.dispose();
    part.material?.dispose();
  });
  old = content;
  const scene = new Scene();
  scene.background = new Color(0x101014);
  scene.add(content);
  content.updateMatrixWorld(true);
  const [first] = cameras;
  const start = first.getWorldPosition(new Vector3());
  const ahead = first.getWorldDirection(new Vector3());
  const cloud = content.getObjectByName("points");
  const distance = median(cloud, start);
  cloud.material.size = 2 * window.devicePixelRatio;
  // From a little behind the first photo's camera, around what is in the middle of its photo.
  const camera = new PerspectiveCamera(1.1 * first.fov, 1, distance / 1e3, distance * 1e3);
  camera.position.copy(start).addScaledVector(ahead, -0.25 * distance);
  const target = start.clone().addScaledVector(ahead, distance);
  controls = new OrbitControls(camera, canvas);
  controls.target.copy(target);
  controls.listenToKeyEvents(canvas);
  controls.update();
  const draw = () => renderer.render(scene, camera);
  const resize = () => {
    const { clientWidth, clientHeight } = canvas;
    if (!clientWidth) return;
    renderer.setPixelRatio(window.devicePixelRatio);
    renderer.setSize(clientWidth, clientHeight, false);
    camera.aspect = clientWidth / clientHeight;
    camera.updateProjectionMatrix();
    draw();
  };
  controls.addEventListener("change", draw);
  watcher = new ResizeObserver(resize);
  watcher.observe(canvas);
  resize();
}
