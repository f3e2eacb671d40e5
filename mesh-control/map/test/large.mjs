// Draws a mesh of many workloads in a real browser, with made-up figures, and measures: how long until it is drawn, how long that
// takes for a mesh of a few, and how many frames a second there are while a person pans. Arguments: the page's directory, the browser, a directory for pictures, and how
// many workloads and namespaces. Prints one JSON document; what is good enough, the caller decides.
import { readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import puppeteer from 'puppeteer-core';

const [directory, executablePath, pictures, workloads = '2000', namespaces = '40'] = process.argv.slice(2);

// The same figures each time: a generator with a fixed seed.
function edges(count, groups) {
  let seed = 7;
  const below = (n) => {
    seed = (seed * 1103515245 + 12345) % 2147483648;
    return Math.floor((seed / 2147483648) * n);
  };
  const end = (i) => ({ namespace: `team-${i % groups}`, name: `workload-${i}` });
  const paths = ['tunnel', 'tunnel', 'fast', 'waypoint', 'plain'];
  const made = [];
  for (let i = 0; i < count; i += 1) {
    for (let n = 0; n < 3; n += 1) {
      // Most talk within their namespace.
      const other = below(10) ? (i + groups * (1 + below(20))) % count : below(count);
      if (other === i) continue;
      const bad = below(200) === 0;
      const opened = 1 + below(5000);
      made.push({ source: end(i), destination: end(other), path: paths[below(paths.length)], service: `workload-${other}.team-${other % groups}.svc.cluster.local`,
        opened, toServer: opened * 300, toClient: opened * 2000, denied: bad ? 3 : 0, failed: 0, dropped: 0, resets: below(50) ? 0 : 1,
        retransmits: 0, p50Us: 384, p99Us: 3072, trouble: bad ? 'denied: AuthorizationPolicy team/only' : null });
    }
  }
  return made;
}

const answer = (count, groups) => JSON.stringify({ until: 0, seconds: 60, edges: edges(Number(count), Number(groups)) });
const large = answer(workloads, namespaces);
let drawn = answer(20, 2);
const server = createServer(async (request, response) => {
  const path = new URL(request.url, 'http://localhost').pathname;
  const type = { js: 'text/javascript', css: 'text/css' }[path.split('.').pop()] || 'text/html';
  try {
    if (path === '/flows/graph') response.setHeader('content-type', 'application/json').end(drawn);
    else if (path.startsWith('/map')) response.setHeader('content-type', type).end(await readFile(`${directory}/${path.slice(5) || 'index.html'}`));
    else response.writeHead(404).end();
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((done) => server.listen(0, '127.0.0.1', done));
const browser = await puppeteer.launch({
  executablePath, headless: true,
  args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-proxy-server'],
});
const seen = { errors: [] };
try {
  const page = await browser.newPage();
  await page.setViewport({ width: 1280, height: 800 });
  page.on('pageerror', (error) => seen.errors.push(`${error}`));
  page.on('console', (message) => { if (message.type() === 'error' && !message.text().includes('404')) seen.errors.push(message.text()); });
  const frame = () => page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
  // Until a frame was painted after whatever happened.
  const until = async (condition) => {
    const start = Date.now();
    await page.waitForFunction(condition, { timeout: 120000, polling: 20 });
    await frame();
    return Date.now() - start;
  };
  // Frames while the left button drags the empty ground about, as the page itself counts them.
  const pan = async () => {
    await page.evaluate(() => {
      window.frames_ = [];
      const count = (at) => { window.frames_.push(at); window.counting = requestAnimationFrame(count); };
      window.counting = requestAnimationFrame(count);
    });
    await page.mouse.move(8, 120);
    await page.mouse.down();
    const start = Date.now();
    for (let step = 0; Date.now() - start < 3000; step += 1) {
      await page.mouse.move(8 + 400 * Math.abs(Math.sin(step / 40)), 120 + 300 * Math.abs(Math.sin(step / 55)));
    }
    const took = Date.now() - start;
    await page.mouse.up();
    const stamps = await page.evaluate(() => { cancelAnimationFrame(window.counting); return window.frames_; });
    const gaps = stamps.slice(1).map((at, i) => at - stamps[i]).sort((a, b) => a - b);
    return { framesPerSecond: Math.round((stamps.length * 1000) / took), p95FrameMs: Math.round(gaps[Math.floor(gaps.length * 0.95)] || 0) };
  };
  const open = async () => {
    const start = Date.now();
    await page.goto(`http://127.0.0.1:${server.address().port}/map`, { waitUntil: 'load' });
    await until(() => document.documentElement.dataset.state === 'drawn');
    return Date.now() - start;
  };
  // The first time is the browser's own.
  await open();
  seen.fewMs = await open();
  drawn = large;
  seen.drawnMs = await open();
  seen.nodes = await page.evaluate(() => window.undermesh.cy.nodes().length);
  seen.edges = await page.evaluate(() => window.undermesh.cy.edges().length);
  await page.screenshot({ path: `${pictures}/large.png` });
  seen.pan = await pan();

  // Everything opened at once, as somebody with a large screen may want.
  await page.evaluate(() => { document.documentElement.dataset.state = 'opening'; });
  const opening = Date.now();
  await page.keyboard.press('e');
  await until(() => window.undermesh.cy.nodes().length >= 2000 || document.documentElement.dataset.state === 'drawn');
  seen.openedMs = Date.now() - opening;
  seen.openedNodes = await page.evaluate(() => window.undermesh.cy.nodes().length);
  seen.openedVisible = await page.evaluate(() => window.undermesh.cy.nodes().filter((node) => !node.isParent() && node.visible()).length);
  await page.screenshot({ path: `${pictures}/opened.png` });
  seen.openedPan = await pan();
  console.log(JSON.stringify(seen));
} finally {
  await browser.close();
  server.close();
}
