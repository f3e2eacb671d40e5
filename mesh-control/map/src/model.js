// What is to be drawn of who talks to whom. Pure: no page, no graph library.
import { edgeText, health, worse } from './figures.js';

export const nameOf = (end) => (end.namespace ? `${end.namespace}${end.name ? `/${end.name}` : ''}` : end.name);
export const groupOf = (end) => `ns:${end.namespace}`;

const COUNTS = ['opened', 'toServer', 'toClient', 'denied', 'failed', 'dropped', 'resets', 'retransmits'];

// Adds an edge's figures to another's. Of times the longer counts: a share of a whole cannot be had from its parts' shares.
function merge(into, edge) {
  for (const count of COUNTS) into[count] += edge[count];
  for (const time of ['p50Us', 'p99Us']) into[time] = Math.max(into[time] ?? 0, edge[time] ?? 0) || null;
  into.trouble = edge.trouble || into.trouble;
  into.lines += 1;
}

function width(edge, seconds) {
  const secured = edge.path === 'tunnel' || edge.path === 'waypoint';
  return Math.round((1.5 + Math.min(5, Math.log10(1 + (edge.opened / seconds) * 10)) + (secured ? 1.5 : 0)) * 2) / 2;
}

// How many workloads there are.
export function workloads(edges) {
  return new Set(edges.flatMap((edge) => [nameOf(edge.source), nameOf(edge.destination)])).size;
}

// By id: what the graph shows, and the figures behind its lines. A namespace that is not open is one node, and what goes on within
// it is that node's own health.
export function elements(edges, seconds, isOpen) {
  const drawn = new Map();
  const figures = new Map();
  const members = new Map();
  const place = (end) => {
    if (!end.namespace) {
      drawn.set(end.name, { id: end.name, label: end.name, outside: true });
      return { id: end.name, end };
    }
    const group = groupOf(end);
    if (!members.has(group)) members.set(group, new Set());
    members.get(group).add(end.name);
    const open = isOpen(end.namespace);
    if (!drawn.has(group)) drawn.set(group, { id: group, label: end.namespace, group: true, closed: !open, health: 'idle' });
    if (!open) return { id: group, end: { namespace: end.namespace, name: '' } };
    drawn.set(nameOf(end), { id: nameOf(end), label: end.name, parent: group });
    return { id: nameOf(end), end };
  };
  for (const edge of edges) {
    const [source, target] = [place(edge.source), place(edge.destination)];
    if (source.id === target.id && source.id.startsWith('ns:')) {
      const group = drawn.get(source.id);
      group.health = worse(group.health, health(edge));
      continue;
    }
    const id = `${source.id}>${target.id}>${edge.path}`;
    if (figures.has(id)) merge(figures.get(id), edge);
    else figures.set(id, { ...edge, source: source.end, destination: target.end, lines: 1 });
    if (!drawn.has(id)) drawn.set(id, { id, source: source.id, target: target.id, path: edge.path });
  }
  for (const [id, edge] of figures) {
    Object.assign(drawn.get(id), { health: health(edge), label: edgeText(edge, seconds), width: width(edge, seconds) });
  }
  for (const [id, names] of members) {
    const group = drawn.get(id);
    if (group.closed) Object.assign(group, { label: `${group.label} (${names.size})`, size: Math.round(26 + 6 * Math.sqrt(names.size)) });
  }
  return { drawn, figures };
}
