// The live map: asks the relay who talks to whom, and draws it. Nothing else is loaded; nothing leaves this page.
import { json, onLogin } from './ask.js';
import { Detail } from './detail.js';
import { $, element } from './dom.js';
import { edgeText, health, totals } from './figures.js';
import { Graph } from './graph.js';
import { elements, workloads } from './model.js';
import * as views from './views.js';

const EVERY = 2000;
// Above so many workloads, namespaces are folded until somebody unfolds them.
const FOLD = 150;

const app = {
  edges: [],
  figures: new Map(),
  seconds: 60,
  busy: false,
  asked: false,
  // What somebody has said of all namespaces, and of single ones.
  all: null,
  groups: new Map(),
  isOpen: (name) => app.groups.get(name) ?? app.all ?? workloads(app.edges) <= FOLD,
  toggle(name, to = !app.isOpen(name)) {
    app.groups.set(name, to);
    draw();
    app.choose(`ns:${name}`);
  },
  // Shows a workload, also one whose namespace is folded.
  go(id) {
    const name = id.includes('/') ? id.split('/')[0] : null;
    if (name && !app.isOpen(name)) {
      app.groups.set(name, true);
      draw();
    }
    const found = graph.cy.getElementById(id);
    if (found.empty()) return;
    graph.cy.animate({ center: { eles: found }, duration: 200 });
    app.choose(id);
  },
  choose(id) {
    const was = $('detail').hidden;
    graph.select(id);
    detail.choose(id, app.figures.get(id));
    if (was !== $('detail').hidden) graph.cy.resize();
    // What was chosen is not to lie behind the panel.
    const chosen = id && graph.cy.getElementById(id);
    if (was && chosen && chosen.nonempty() && chosen.isNode() && chosen.renderedPosition().x > graph.cy.width() - 60) graph.cy.center(chosen);
    if (id !== null || location.hash) history.replaceState(null, '', id ? `#${encodeURIComponent(id)}` : location.pathname);
  },
};
const graph = new Graph($('graph'));
const detail = new Detail(app);

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  graph.restyle();
}

function draw() {
  const isOpen = (() => {
    const folded = workloads(app.edges) > FOLD;
    return (name) => app.groups.get(name) ?? app.all ?? !folded;
  })();
  const shown = $('trouble').checked ? app.edges.filter((edge) => health(edge) !== 'good') : app.edges;
  const { drawn, figures } = elements(shown, app.seconds, isOpen);
  app.figures = figures;
  graph.draw(drawn);
  $('empty').hidden = drawn.size > 0;
  $('totals').textContent = totals(app.edges, app.seconds);
  suggest();
  graph.fade($('search').value.trim().toLowerCase());
  if (detail.id && (graph.cy.getElementById(detail.id).nonempty() || detail.facts)) detail.show(app.figures.get(detail.id));
  document.documentElement.dataset.state = 'drawn';
}

// Names to search for: of all workloads, also of folded namespaces.
let suggested = '';
function suggest() {
  const names = [...new Set(app.edges.flatMap((edge) => [edge.source, edge.destination])
    .flatMap((end) => (end.namespace ? [end.namespace, `${end.namespace}/${end.name}`] : [end.name])))].sort();
  const key = names.join();
  if (key === suggested) return;
  suggested = key;
  $('names').replaceChildren(...names.map((name) => Object.assign(element('option'), { value: name })));
}

let drawnOnce = false;
// One request at a time. What is asked for meanwhile, another time say, is fetched when it is over: it is not to be forgotten.
async function refresh() {
  app.asked = true;
  if (app.busy) return;
  app.busy = true;
  while (app.asked && !$('login').open) {
    app.asked = false;
    await fetchAndDraw();
  }
  app.busy = false;
}

async function fetchAndDraw() {
  try {
    const back = Number($('time').value);
    const until = back < 0 ? `&until=${Math.floor(Date.now() / 1000) + back}` : '';
    const seen = await json(`flows/graph?seconds=${app.seconds}${until}`);
    while (graph.moving) await new Promise((done) => setTimeout(done, 100));
    app.edges = seen.edges;
    draw();
    if (!drawnOnce) {
      drawnOnce = true;
      follow();
    }
  } catch (error) {
    document.documentElement.dataset.state = 'failed';
    $('totals').textContent = `${error.message}`.slice(0, 200);
  }
}

async function open(name) {
  try {
    await views[name](() => { $('view').hidden = true; });
  } catch (error) {
    $('totals').textContent = `${error.message}`.slice(0, 200);
  }
}

// What the address names: a page, a workload, a namespace.
function follow() {
  const named = decodeURIComponent(location.hash.slice(1));
  if (named === 'config' || named === 'strict') open(named);
  else if (named.startsWith('ns:') || named.includes('>')) app.choose(named);
  else if (named) app.go(named);
}

function slide() {
  const back = Number($('time').value);
  $('when').textContent = back < 0 ? new Date(Date.now() + back * 1000).toLocaleTimeString([], { hour12: false }) : 'now';
  $('live').setAttribute('aria-pressed', `${back === 0}`);
  refresh();
}

function unfoldAll() {
  const names = [...graph.cy.nodes('[?group]')].map((node) => node.id().slice(3));
  app.all = !names.every(app.isOpen);
  app.groups.clear();
  draw();
  graph.fit();
}

graph.cy.on('tap', (event) => app.choose(event.target === graph.cy ? null : event.target.id()));
graph.cy.on('dbltap', 'node[?group]', (event) => app.toggle(event.target.id().slice(3)));
graph.cy.on('mouseover', 'edge', (event) => {
  const edge = app.figures.get(event.target.id());
  if (edge) graph.title(edgeText(edge, app.seconds, true));
});
graph.cy.on('mouseout', 'edge', () => graph.title(''));
$('search').addEventListener('input', () => graph.fade($('search').value.trim().toLowerCase()));
$('search').addEventListener('change', () => {
  const name = $('search').value.trim();
  if (graph.cy.getElementById(`ns:${name}`).nonempty()) app.choose(`ns:${name}`);
  else app.go(name);
});
$('trouble').addEventListener('change', draw);
$('window').addEventListener('change', () => { app.seconds = Number($('window').value); refresh(); });
$('time').addEventListener('input', slide);
$('live').addEventListener('click', () => { $('time').value = 0; slide(); });
$('fit').addEventListener('click', () => graph.fit());
$('unfold').addEventListener('click', unfoldAll);
$('config').addEventListener('click', () => open('config'));
$('strict').addEventListener('click', () => open('strict'));
$('theme').addEventListener('click', () => setTheme(document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark'));
const KEYS = { f: 'fit', t: 'theme', l: 'live', e: 'unfold', c: 'config', s: 'strict' };
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') {
    $('search').value = '';
    graph.fade('');
    if ($('view').hidden) app.choose(null);
    else $('view').hidden = true;
    document.activeElement.blur();
  }
  if (['INPUT', 'SELECT'].includes(document.activeElement.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { ArrowLeft: -60, ArrowRight: 60 }[event.key];
  if (event.key === '/') { event.preventDefault(); $('search').focus(); }
  if (KEYS[event.key]) $(KEYS[event.key]).click();
  if (event.key === 'Enter' && detail.id?.startsWith('ns:') && document.activeElement === document.body) app.toggle(detail.id.slice(3));
  if (step) { $('time').value = Number($('time').value) + step; slide(); }
});

onLogin(refresh);
window.addEventListener('hashchange', follow);
setTheme(matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
// For the test: what is drawn, and where.
window.undermesh = { cy: graph.cy, app };
refresh();
setInterval(() => { if (Number($('time').value) === 0 && !document.hidden) refresh(); }, EVERY);
