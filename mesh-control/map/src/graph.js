// The graph on the page: its looks, where things lie, and what changes from one look at the mesh to the next.
import cytoscape from 'cytoscape';
import fcose from 'cytoscape-fcose';
import { $ } from './dom.js';

cytoscape.use(fcose);

// Above so many nodes, lines have neither words nor arrows, and namespaces lie in a grid: a person looks for colour there, and
// searches. It is also what a machine without a graphics card draws at once.
const MANY = 300;
// Above so many lines they have no words: those of one that is pointed at are shown.
const BUSY = 120;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export class Graph {
  constructor(container) {
    this.cy = cytoscape({ container, style: [], minZoom: 0.02, maxZoom: 3, textureOnViewport: true, hideEdgesOnViewport: true });
    this.many = false;
    this.busy = false;
    this.arranged = false;
    this.shown = new Map();
    this.moved = 0;
    this.cy.on('viewport', () => { this.moved = performance.now(); });
  }

  // Whether somebody pans or zooms just now: nothing is to be redrawn under his hand.
  get moving() {
    return performance.now() - this.moved < 400;
  }

  restyle() {
    this.cy.style(this.style());
  }

  style() {
    const of = { good: colour('good'), warn: colour('warn'), bad: colour('bad'), idle: colour('dim') };
    const text = { color: colour('text'), 'font-size': 11, 'font-family': 'system-ui, sans-serif', 'min-zoomed-font-size': this.many ? 8 : 0 };
    const colours = Object.entries(of).flatMap(([health, tint]) => [
      { selector: `edge[health = "${health}"]`, style: { 'line-color': tint, 'target-arrow-color': tint } },
      { selector: `node[?closed][health = "${health}"]`, style: { 'border-color': tint } },
    ]);
    const lines = this.many
      ? { 'curve-style': 'haystack', width: 1.5, opacity: 0.7 }
      : { ...text, 'font-size': 9, label: this.busy ? '' : 'data(label)', 'curve-style': 'bezier', 'target-arrow-shape': 'triangle', 'arrow-scale': 0.9,
        width: this.busy ? 2 : 'data(width)', opacity: this.busy ? 0.6 : 1, 'text-rotation': 'autorotate', 'text-background-color': colour('back'), 'text-background-opacity': 0.85,
        'text-background-padding': 1, 'min-zoomed-font-size': 7 };
    return [
      { selector: 'node', style: { ...text, label: 'data(label)', 'background-color': colour('node'), width: 26, height: 26,
        'text-valign': 'bottom', 'text-margin-y': 4, 'border-width': 0 } },
      { selector: 'node[?outside]', style: { shape: 'diamond', 'background-color': colour('dim') } },
      { selector: 'node[?closed]', style: { shape: 'round-rectangle', width: 'data(size)', height: 'data(size)', 'background-color': colour('group'),
        'border-width': 3, 'font-size': this.busy ? 22 : 13 } },
      { selector: ':parent', style: { ...text, 'background-color': colour('group'), 'border-color': colour('rim'), 'border-width': 1,
        shape: 'round-rectangle', 'text-valign': 'top', 'text-margin-y': -4, 'font-size': this.many ? 56 : 13, padding: 18 } },
      { selector: 'edge', style: { ...lines, 'line-style': 'solid' } },
      ...colours,
      ...(this.many ? [] : [
        { selector: 'edge[path = "plain"]', style: { 'line-style': 'dashed' } },
        { selector: 'edge[path = "fast"]', style: { 'line-style': 'dotted' } },
      ]),
      { selector: 'edge[health = "bad"]', style: { opacity: 1, 'z-index': 2 } },
      { selector: '.faded', style: { opacity: 0.12 } },
      { selector: ':selected', style: { 'border-width': 3, 'border-color': colour('accent'), 'overlay-color': colour('accent'), 'overlay-opacity': 0.12 } },
    ];
  }

  // Takes what is to be drawn, by id. Only what looks otherwise than before is touched.
  draw(drawn) {
    const nodes = [...drawn.values()].filter((data) => !data.source).length;
    const many = nodes > MANY;
    const busy = drawn.size - nodes > BUSY;
    const old = this.shown;
    const same = (a, b) => a.label === b.label && a.health === b.health && a.width === b.width && a.size === b.size;
    const moved = (a, b) => a.parent !== b.parent || a.closed !== b.closed;
    const gone = [...old.keys()].filter((id) => !drawn.has(id) || moved(old.get(id), drawn.get(id)));
    const added = [...drawn.values()].filter((data) => !old.has(data.id) || moved(old.get(data.id), data));
    const restyled = many !== this.many || busy !== this.busy || !this.arranged;
    // Groups before their members, nodes before edges.
    const order = (data) => (data.source ? 2 : data.group ? 0 : 1);
    added.sort((a, b) => order(a) - order(b));
    // What a group looked like stays where it was when it opens.
    const where = new Map(gone.filter((id) => id.startsWith('ns:')).map((id) => [id, { ...this.cy.getElementById(id).position() }]));
    this.many = many;
    this.busy = busy;
    if (restyled) this.restyle();
    gone.map((id) => this.cy.getElementById(id)).reduce((all, one) => all.merge(one), this.cy.collection()).remove();
    // A line goes with its end, also where only the end has changed.
    const lost = gone.length ? [...drawn.values()].filter((data) => data.source && this.cy.getElementById(data.id).empty()) : [];
    const ids = new Set([...added, ...lost].map((data) => data.id));
    this.cy.add([...ids].map((id) => drawn.get(id)).map((data) => ({ group: data.source ? 'edges' : 'nodes', data: { ...data },
      ...(where.has(data.parent) ? { position: { ...where.get(data.parent) } } : {}) })));
    this.cy.batch(() => {
      for (const data of drawn.values()) {
        const before = old.get(data.id);
        if (before && !ids.has(data.id) && !same(before, data)) this.cy.getElementById(data.id).data(data);
      }
    });
    this.shown = drawn;
    const grown = added.some((data) => !data.source);
    if (grown || (restyled && nodes)) this.arrange(gone.length > 0 && grown);
    return grown;
  }

  arrange(again) {
    if (this.many) this.arrangeMany();
    else {
      const fresh = !this.arranged;
      const length = this.busy ? 320 : 140;
      this.cy.layout({ name: 'fcose', animate: false, randomize: fresh, nodeDimensionsIncludeLabels: true, nodeSeparation: 120,
        nodeRepulsion: () => (this.busy ? 60000 : 4500), edgeElasticity: () => (this.busy ? 0.1 : 0.45), idealEdgeLength: () => length, padding: 50,
        fit: fresh || again }).run();
    }
    if (!this.arranged || this.many) this.fit();
    this.arranged = true;
    // A small mesh is not blown up.
    if (this.cy.zoom() > 1.4) {
      this.cy.zoom(1.4);
      this.cy.center();
    }
  }

  // Each namespace is a grid, and they lie in a grid.
  arrangeMany() {
    const groups = this.cy.nodes(':parent').map((group) => group.children());
    groups.push(this.cy.nodes('[?closed], [?outside]'));
    const full = groups.filter((nodes) => nodes.nonempty());
    const side = Math.ceil(Math.sqrt(Math.max(...full.map((nodes) => nodes.length)))) * 60;
    // As wide as a screen is.
    const columns = Math.ceil(Math.sqrt(full.length * 1.8));
    // Not in a batch: in one the library takes groups for empty, and does not draw what is in them.
    full.forEach((nodes, i) => {
      const [x, y] = [(i % columns) * (side + 90), Math.floor(i / columns) * (side + 90)];
      nodes.layout({ name: 'grid', fit: false, animate: false, boundingBox: { x1: x, y1: y, w: side, h: side } }).run();
    });
  }

  fit() {
    this.cy.fit(undefined, 50);
  }

  fade(text) {
    const { cy } = this;
    const faded = cy.elements('.faded');
    if (!text) {
      if (faded.nonempty()) faded.removeClass('faded');
      return;
    }
    const hit = cy.nodes().filter((node) => !node.isParent() && node.id().toLowerCase().includes(text));
    const kept = hit.union(hit.connectedEdges()).union(hit.neighborhood()).union(hit.parents());
    cy.batch(() => {
      cy.elements().removeClass('faded');
      cy.elements().difference(kept.union(kept.parents())).addClass('faded');
    });
  }

  select(id) {
    this.cy.elements(':selected').unselect();
    if (id) this.cy.getElementById(id).select();
  }

  title(text) {
    $('graph').title = text;
  }
}
