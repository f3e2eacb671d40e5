// Requests to the relay; the token stays in this tab.
import { $ } from './dom.js';

const TOKEN = 'undermesh-token';

export async function ask(path) {
  const token = sessionStorage.getItem(TOKEN);
  const answer = await fetch(path, token ? { headers: { authorization: `Bearer ${token}` } } : {});
  if (answer.status === 401) login(await answer.text());
  if (!answer.ok) throw new Error(await answer.text().catch(() => `${answer.status}`));
  return answer;
}

export const json = async (path) => (await ask(path)).json();

// Events, oldest first, without the mark at the end.
export async function events(query) {
  const text = await (await ask(`flows?${query}`)).text();
  return text.trim().split('\n').map((line) => JSON.parse(line)).filter((line) => !line.mark);
}

function login(why) {
  $('why').textContent = sessionStorage.getItem(TOKEN) ? why : '';
  if (!$('login').open) $('login').showModal();
}

export function onLogin(then) {
  $('login').addEventListener('close', () => {
    const token = $('token').value.trim();
    if (token) sessionStorage.setItem(TOKEN, token);
    then();
  });
}
