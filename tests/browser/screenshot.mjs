// Usage: node screenshot.mjs CHROMIUM PAGE OUT WIDTH HEIGHT. Saves what the page's viewer shows, without its controls.
import { pathToFileURL } from 'node:url';
import { chromium } from 'playwright-core';

const [executablePath, page, out, width, height] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath,
  args: [
    '--no-sandbox', '--use-angle=swiftshader', '--enable-unsafe-swiftshader', '--ignore-gpu-blocklist',
    '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync',
  ],
});
try {
  const tab = await browser.newPage({ viewport: { width: Number(width), height: Number(height) } });
  const problems = [];
  tab.on('pageerror', (error) => problems.push(error.message));
  await tab.goto(`${pathToFileURL(page)}?webgl&noui`);
  await tab.waitForSelector('html[data-loaded=true]', { state: 'attached', timeout: 60000 }).catch((error) => {
    throw new Error(`the scene did not load: ${problems.join('; ') || error.message}`);
  });
  // Splats are sorted in a worker: the picture stands when two in a row are the same.
  let picture = await tab.screenshot();
  for (let i = 0; i < 40; i += 1) {
    await tab.waitForTimeout(250);
    const next = await tab.screenshot({ path: out });
    if (i > 2 && next.equals(picture)) break;
    picture = next;
  }
} finally {
  await browser.close();
}
