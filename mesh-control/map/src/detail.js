// What was chosen: a line, a namespace, or the page of a service or workload.
import { events, json } from './ask.js';
import { $, button, cell, clock, element, link, table } from './dom.js';
import { bytes, duration, health, rate } from './figures.js';
import { groupOf, nameOf } from './model.js';

const PATHS = { tunnel: 'tunnel: mutual TLS', waypoint: 'waypoint: mutual TLS', fast: 'fast: in the kernel, within a node; not encrypted', plain: 'plain: not encrypted' };
const bad = (edge) => edge.denied + edge.failed + edge.dropped;
const section = (title, ...parts) => [element('h3', title), ...parts];

export class Detail {
  // `app` has edges and seconds, and says who is chosen.
  constructor(app) {
    this.app = app;
    this.id = null;
    this.forget();
  }

  forget() {
    this.flows = null;
    this.facts = null;
    this.story = null;
  }

  // Shows something else, and asks for what the graph does not hold.
  async choose(id, edge) {
    this.id = id;
    this.edge = edge;
    this.forget();
    this.show();
    if (!id) return;
    const plain = encodeURIComponent;
    const query = edge ? `from=${plain(nameOf(edge.source))}&to=${plain(nameOf(edge.destination))}` : `pod=${plain(id)}`;
    const whole = id.startsWith('ns:') || (edge && (!edge.source.name || !edge.destination.name));
    const asked = [];
    if (!whole) asked.push(events(`last=15&${query}`).then((flows) => ({ flows: flows.reverse() })));
    if (!edge && id.includes('/')) asked.push(json(`flows/service?of=${plain(id)}`).then((facts) => ({ facts })));
    // One may fail; the graph says so, too.
    for (const answer of await Promise.allSettled(asked)) {
      if (this.id === id && answer.status === 'fulfilled') Object.assign(this, answer.value);
    }
    if (this.id === id) this.show();
  }

  async tell(connection) {
    const id = this.id;
    const told = await events(`last=200&connection=${encodeURIComponent(connection)}`).catch(() => []);
    if (this.id !== id) return;
    this.story = { connection, told: told.sort((a, b) => a.atUs - b.atUs) };
    this.show();
  }

  show(edge = this.edge) {
    this.edge = edge;
    const panel = $('detail');
    panel.hidden = !this.id;
    if (panel.hidden) return;
    const closing = button('Close', () => this.app.choose(null), 'close');
    const parts = edge ? this.ofEdge(edge) : this.id.startsWith('ns:') ? this.ofGroup() : this.ofNode();
    panel.replaceChildren(closing, ...parts, ...this.recent(), ...this.told());
  }

  ofEdge(edge) {
    const { seconds } = this.app;
    return [element('h2', `${nameOf(edge.source)} to ${nameOf(edge.destination)}`), table(['', ''], [
      ['service', edge.service || '-'],
      ['path', PATHS[edge.path]],
      ...(edge.lines > 1 ? [['lines', `${edge.lines} of workloads, times are those of the slowest`]] : []),
      ['connections', `${edge.opened} (${rate(edge.opened, seconds)})`],
      ['time to connect', `p50 ${duration(edge.p50Us)}, p99 ${duration(edge.p99Us)}`],
      ['bytes', `${bytes(edge.toServer)} up, ${bytes(edge.toClient)} down`],
      ['denied, failed, dropped', `${edge.denied}, ${edge.failed}, ${edge.dropped}`],
      ['resets, retransmitted', `${edge.resets}, ${edge.retransmits}`],
      ['last trouble', edge.trouble || '-'],
    ])];
  }

  mine(side) {
    const of = this.id.startsWith('ns:') ? groupOf : nameOf;
    return this.app.edges.filter((edge) => of(edge[side]) === this.id);
  }

  // Who calls it and whom it calls.
  traffic(inward, outward) {
    const parts = [];
    const { seconds } = this.app;
    for (const [title, side, other] of [[inward, 'destination', 'source'], [outward, 'source', 'destination']]) {
      const edges = this.mine(side).sort((a, b) => bad(b) - bad(a) || b.opened - a.opened);
      const rows = edges.slice(0, 100).map((edge) => [
        element('td', '', health(edge)), edge.path, rate(edge.opened, seconds), duration(edge.p50Us), duration(edge.p99Us), bad(edge) || '',
      ]);
      rows.forEach(([name], i) => name.append(button(nameOf(edges[i][other]), () => this.app.go(nameOf(edges[i][other])), 'name')));
      parts.push(element('h3', `${title} (${edges.length})`));
      if (rows.length) parts.push(table(['with', 'path', 'rate', 'p50', 'p99', 'bad'], rows));
      if (edges.length > rows.length) parts.push(element('p', `and ${edges.length - rows.length} more`));
    }
    const trouble = [...this.mine('destination'), ...this.mine('source')].filter((edge) => edge.trouble).slice(0, 30);
    if (trouble.length) {
      parts.push(...section('Trouble', table(['from', 'to', 'last'],
        trouble.map((edge) => [nameOf(edge.source), nameOf(edge.destination), cell(edge.trouble, 'bad')]))));
    }
    return parts;
  }

  strict() {
    const from = [...new Set(this.mine('destination').filter((edge) => edge.path === 'plain').map((edge) => nameOf(edge.source)))];
    return section('Ready for STRICT?', element('p', from.length ? `no: in this time, plain text came from ${from.slice(0, 20).join(', ')}`
      : 'no plain text came in this time', from.length ? 'warn' : 'good'));
  }

  ofGroup() {
    const name = this.id.slice(3);
    const open = this.app.isOpen(name);
    return [element('h2', `namespace ${name}`), button(open ? 'Fold' : 'Unfold', () => this.app.toggle(name)),
      ...this.traffic('Called by', 'Calls'), ...this.strict()];
  }

  ofNode() {
    const parts = [element('h2', this.id)];
    const { facts } = this;
    if (facts) {
      const says = [['mutual TLS', facts.mode], ...facts.services.map((service) => ['service',
        [service.hostname, ...service.addresses, service.ports.join(', '), service.waypoint && `waypoint ${service.waypoint}`].filter(Boolean).join(' · ')])];
      parts.push(table(['', ''], says));
      if (facts.traces) parts.push(link('Traces', facts.traces));
    }
    parts.push(...this.traffic('Called by', 'Calls'));
    if (facts) {
      parts.push(...this.objects('Policies that apply', facts.policies), ...this.objects('Routes', facts.routes));
      parts.push(...section(`Pods (${facts.pods.length})`, table(['pod', 'node', 'state', 'identity', 'certificate until'], facts.pods.map((pod) => [
        pod.name, pod.node, cell([pod.captured ? 'in the mesh' : 'not in the mesh', pod.ready ? '' : 'not ready'].filter(Boolean).join(', '), pod.captured ? 'good' : 'warn'),
        pod.identity, pod.certificateUntil || '-',
      ]))));
    }
    parts.push(...this.strict());
    return parts;
  }

  objects(title, list) {
    if (!list.length) return section(`${title} (0)`);
    return section(`${title} (${list.length})`, table(['object', 'says', ''], list.map((object) => [
      `${object.kind} ${object.namespace}/${object.name}`, object.says,
      cell([object.denied ? `denied ${object.denied}` : '', object.finding].filter(Boolean).join(', '), object.denied || object.finding ? 'bad' : ''),
    ])));
  }

  recent() {
    if (!this.flows) return [];
    return section('Last events', table(['time', 'node', 'event', 'found', 'story'], this.flows.map((flow) => [
      clock(flow.atUs), flow.node, cell(flow.kind, flow.verdict === 'forwarded' ? '' : 'bad'),
      [flow.verdict === 'forwarded' ? '' : flow.verdict, flow.reason, flow.policy, flow.closedWith].filter(Boolean).join(', '),
      flow.connection ? button('show', () => this.tell(flow.connection), 'name') : '',
    ])));
  }

  told() {
    if (!this.story) return [];
    const { connection, told } = this.story;
    const start = told[0]?.atUs ?? 0;
    const parts = section(`Connection ${connection}`, table(['after', 'node', 'side', 'event', 'path'], told.map((flow) => [
      duration(flow.atUs - start), flow.node, flow.side, cell(flow.kind, flow.verdict === 'forwarded' ? '' : 'bad'), flow.path,
    ])));
    const traces = this.facts?.connectionTraces;
    if (traces) parts.push(link('Trace', traces.replace('{connection}', encodeURIComponent(connection))));
    return parts;
  }
}

