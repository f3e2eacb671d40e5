// Pieces of the page. Text only: names come from the cluster and are never read as markup.

export const $ = (id) => document.getElementById(id);

export function element(tag, text = '', classes = '') {
  const made = document.createElement(tag);
  made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

export function button(text, does, classes = '') {
  const made = element('button', text, classes);
  made.type = 'button';
  made.addEventListener('click', does);
  return made;
}

// A link to another page. Only of the web: an address comes from a setting.
export function link(text, to) {
  const made = element('a', text);
  if (/^https?:\/\//.test(to)) made.href = to;
  made.target = '_blank';
  made.rel = 'noopener noreferrer';
  return made;
}

export function table(titles, rows) {
  const made = element('table');
  const head = made.createTHead().insertRow();
  titles.forEach((title) => head.append(element('th', title)));
  const body = made.createTBody();
  for (const cells of rows) {
    const row = body.insertRow();
    cells.forEach((cell) => {
      if (cell instanceof HTMLTableCellElement) row.append(cell);
      else row.insertCell().append(cell instanceof Node ? cell : `${cell ?? ''}`);
    });
  }
  return made;
}

export const cell = (text, classes) => element('td', text, classes);
export const clock = (us) => new Date(us / 1000).toLocaleTimeString([], { hour12: false });
