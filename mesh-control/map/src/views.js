// Pages beside the graph: what was configured and how far it is, and which namespaces are ready for STRICT.
import { json } from './ask.js';
import { $, button, cell, element, table } from './dom.js';

function wrap(title, close, ...parts) {
  const view = $('view');
  view.replaceChildren(button('Close', close, 'close'), element('h2', title), ...parts);
  view.hidden = false;
  view.focus();
}

function programmed(object) {
  const { programmed: far } = object;
  if (!far) return cell('-');
  const said = `on ${far.acked} of ${far.of} proxies`;
  if (far.rejected) return cell(`${said}; refused: ${far.rejected}`, 'bad');
  return cell(far.acked < far.of ? `${said}; waits for ${far.waiting.join(', ')}` : said, far.acked < far.of ? 'warn' : 'good');
}

export async function config(close) {
  const { proxies, objects } = await json('flows/config');
  const filter = Object.assign(element('input'), { type: 'search', placeholder: 'Kind, namespace, name, or what is said', id: 'filter' });
  filter.setAttribute('aria-label', 'Filter objects');
  const wrong = objects.filter((object) => object.findings.length);
  const rows = objects.map((object) => ({
    text: `${object.kind} ${object.namespace}/${object.name} ${object.findings.join(' ')}`.toLowerCase(),
    cells: [object.kind, [object.namespace, object.name].filter(Boolean).join('/'), programmed(object),
      cell(object.findings.join('\n'), object.findings.length ? 'bad findings' : '')],
  }));
  const list = element('div');
  const show = () => {
    const text = filter.value.trim().toLowerCase();
    const found = rows.filter((row) => row.text.includes(text));
    list.replaceChildren(table(['kind', 'object', 'programmed', 'findings'], found.slice(0, 500).map((row) => row.cells)));
    if (found.length > 500) list.append(element('p', `and ${found.length - 500} more: filter`));
  };
  filter.addEventListener('input', show);
  show();
  wrap('Configuration', close, element('p', `${objects.length} objects, ${wrong.length} with findings; ${proxies} proxies connected`,
    wrong.length ? 'warn' : 'good'), filter, list);
}

export async function strict(close) {
  const { namespaces } = await json('flows/strict');
  const words = { ready: 'ready', no: 'not ready', unknown: 'nothing seen', strict: 'is STRICT' };
  const tints = { ready: 'good', no: 'bad', unknown: 'warn', strict: 'good' };
  wrap('Ready for STRICT?', close, element('p', 'From the plain text that came to pods in the last hour, as far as the relay was told of it.'),
    table(['namespace', 'verdict', 'mode now', 'pods in the mesh', 'why'], namespaces.map((space) => [
      space.namespace, cell(words[space.verdict], tints[space.verdict]), space.mode, `${space.captured} of ${space.pods}`,
      cell(space.why.join('\n'), 'findings'),
    ])));
}
