// Drives the map in a real browser and says what it saw, as one JSON document. Arguments: the map's URL, the browser, and a
// directory for pictures. It fails by its exit code only where the browser does not work: what is right, the caller decides.
import { writeFileSync } from 'node:fs';
import puppeteer from 'puppeteer-core';

const [url, executablePath, pictures] = process.argv.slice(2);
const seen = { errors: [] };
// What is waited for, told when it does not come: the browser's own words name only the time.
const sees = async (page, what, test, ...args) => {
  try {
    await page.waitForFunction(test, { timeout: 10000 }, ...args);
  } catch (error) {
    throw new Error(`not seen: ${what}; ${await page.evaluate(() => document.body.innerText.slice(0, 500))}`, { cause: error });
  }
};
const browser = await puppeteer.launch({
  executablePath, headless: true,
  args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-proxy-server'],
});
try {
  const page = await browser.newPage();
  await page.setViewport({ width: 1280, height: 800 });
  page.on('console', (message) => { if (message.type() === 'error') seen.errors.push(message.text()); });
  page.on('pageerror', (error) => seen.errors.push(`${error}`));
  // Questions about the graph, and what they wait for.
  let asked = 0;
  let held = null;
  // Does something while such a question is on its way: the page has one at a time, so that nothing is drawn meanwhile.
  const meanwhile = async (act) => {
    let release;
    held = new Promise((done) => { release = done; });
    const before = asked;
    for (const end = Date.now() + 10000; asked === before && Date.now() < end;) await new Promise((done) => setTimeout(done, 20));
    if (asked === before) throw new Error('the page does not ask for the graph any more');
    await act();
    held = null;
    release();
  };
  await page.setRequestInterception(true);
  page.on('request', async (request) => {
    if (request.url().includes('flows/graph')) {
      asked += 1;
      await held;
    }
    request.continue();
    if (!request.url().startsWith(new URL(url).origin) && !request.url().startsWith('data:')) seen.errors.push(`asks ${request.url()}`);
  });
  await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: 'dark' }]);
  await page.goto(url, { waitUntil: 'load' });
  await sees(page, 'three lines', () => window.undermesh?.cy.edges().length >= 3);
  await page.evaluate(() => new Promise((done) => setTimeout(done, 2500)));
  const picture = (name) => page.screenshot({ path: `${pictures}/${name}.png` });
  seen.nodes = await page.evaluate(() => window.undermesh.cy.nodes().map((node) => node.id()).sort());
  seen.edges = await page.evaluate(() => window.undermesh.cy.edges().map((edge) => {
    const { source, target, path, health, label } = edge.data();
    return { source, target, path, health, label };
  }));
  seen.totals = await page.$eval('#totals', (node) => node.textContent);
  await picture('dark');

  // By mouse: a click on a workload, where it is drawn.
  const click = async (id) => {
    await meanwhile(async () => {
      const at = await page.evaluate((name) => {
        const place = window.undermesh.cy.getElementById(name).renderedPosition();
        const box = document.getElementById('graph').getBoundingClientRect();
        return { x: box.left + place.x, y: box.top + place.y };
      }, id);
      await page.mouse.click(at.x, at.y);
    });
    await sees(page, `${id} chosen by a click`, (name) => document.querySelector('#detail h2')?.textContent === name, id);
    await sees(page, `the pods and events of ${id}`, () => ['Last events', 'Pods (']
      .every((part) => document.getElementById('detail').textContent.includes(part)));
    return page.$eval('#detail', (node) => node.innerText);
  };
  seen.detail = await click('shop/backend');
  await picture('detail');
  // The story of the newest event's connection.
  await page.evaluate(() => [...document.querySelectorAll('#detail button.name')].findLast((node) => node.textContent === 'show').click());
  await sees(page, 'the story of a connection', () => document.getElementById('detail').textContent.includes('Connection '));
  seen.story = await page.$eval('#detail', (node) => node.innerText.slice(node.innerText.indexOf('Connection ')));

  // By keyboard: search, escape, theme, back in time and live again.
  await page.keyboard.press('Escape');
  seen.closed = await page.$eval('#detail', (node) => node.hidden);
  for (const [key, name] of [['c', 'config'], ['s', 'strict']]) {
    await page.keyboard.press(key);
    await sees(page, `the page ${name}`, (title) => document.querySelector('#view h2')?.textContent === title,
      name === 'config' ? 'Configuration' : 'Ready for STRICT?');
    seen[name] = await page.$eval('#view', (node) => node.innerText);
    await picture(name);
    await page.keyboard.press('Escape');
  }
  // A namespace is folded into one node, and unfolded again.
  seen.folded = await page.evaluate(() => {
    window.undermesh.app.toggle('shop', false);
    return window.undermesh.cy.nodes().map((node) => node.id()).sort();
  });
  seen.foldedEdges = await page.evaluate(() => window.undermesh.cy.edges().map((edge) => edge.id()).sort());
  seen.unfolded = await page.evaluate(() => {
    window.undermesh.app.toggle('shop', true);
    return window.undermesh.cy.getElementById('shop/backend').visible();
  });
  await page.keyboard.press('Escape');
  await page.keyboard.press('/');
  await page.keyboard.type('frontend');
  seen.faded = await page.evaluate(() => window.undermesh.cy.nodes('.faded').map((node) => node.id()).sort());
  await page.keyboard.press('Escape');
  await page.keyboard.press('t');
  seen.theme = await page.evaluate(() => document.documentElement.dataset.theme);
  await picture('light');
  // Also when the answer about now is still on its way while the keys are pressed.
  await meanwhile(async () => { for (let i = 0; i < 30; i += 1) await page.keyboard.press('ArrowLeft'); });
  await sees(page, 'nothing, half an hour ago', () => window.undermesh.cy.nodes().length === 0);
  seen.past = await page.$eval('#empty', (node) => !node.hidden);
  await page.keyboard.press('l');
  await sees(page, 'lines again, live', () => window.undermesh.cy.edges().length > 0);
  seen.live = await page.$eval('#live', (node) => node.getAttribute('aria-pressed'));
  console.log(JSON.stringify(seen));
} finally {
  writeFileSync(`${pictures}/seen.json`, JSON.stringify(seen, null, 1));
  await browser.close();
}
