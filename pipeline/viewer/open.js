// Opens the viewer on the scene that the page carries; `createViewer` is in scope.
const show = (text) => {
  const message = document.getElementById('message');
  message.textContent = text;
  message.style.display = 'grid';
};

const { experience, rotation, extent } = JSON.parse(document.getElementById('settings').textContent);
const carrier = document.getElementById('scene');
const bytes = Uint8Array.from(atob(carrier.textContent), (character) => character.charCodeAt(0));
carrier.remove();

// The viewer's field of view is that of the window's longer side; the whole photo shall fit into the window.
if (extent) {
  const [x, y] = extent; // half sizes of the photo at distance 1
  const aspect = innerWidth / innerHeight;
  const half = aspect > 1 ? Math.max(x, y * aspect) : Math.max(y, x / aspect);
  experience.cameras[0].initial.fov = Math.atan(half) * 360 / Math.PI;
}

const parameters = new URL(location.href).searchParams;
const isAvailable = (name) => Boolean(document.createElement('canvas').getContext(name));
if (!navigator.gpu && !isAvailable('webgl2')) {
  show('This browser cannot show 3D scenes: it has neither WebGPU nor WebGL 2.');
} else {
  const url = URL.createObjectURL(new Blob([bytes]));
  const viewer = await createViewer({
    container: document.body,
    settings: experience,
    contentUrl: url,
    contentFilename: 'scene.sog',
    contents: fetch(url),
    renderer: parameters.has('webgl') || !navigator.gpu ? 'webgl' : 'webgpu',
    ui: !parameters.has('noui'),
    noanim: true,
  }).catch((error) => show(`The scene cannot be shown: ${error.message}`));
  // Scenes come in the frame of their photos; this turns them upright. Rotation: x, y, z, w.
  const turn = (entity) => entity.name === 'gsplat' && entity.setLocalRotation(...rotation);
  viewer?.app.root.on('childinsert', turn);
  viewer?.app.root.children.forEach(turn);
  viewer?.events.on('loaded:changed', () => { document.documentElement.dataset.loaded = 'true'; });
  globalThis.viewer = viewer;
}
