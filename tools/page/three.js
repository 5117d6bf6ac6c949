// What the page's 3D view needs of three.js: `make three` bundles it into one file.
export { Color, PerspectiveCamera, Scene, Vector3, WebGLRenderer } from "three";
export { GLTFLoader } from "three/addons/loaders/GLTFLoader.js";
export { OrbitControls } from "three/addons/controls/OrbitControls.js";
