// Figures in words, and what they mean.

export function health(edge) {
  if (edge.denied + edge.failed + edge.dropped > 0) return 'bad';
  if (edge.resets + edge.retransmits > 0) return 'warn';
  return edge.opened + edge.toServer + edge.toClient > 0 ? 'good' : 'idle';
}

const ORDER = ['idle', 'good', 'warn', 'bad'];

export const worse = (a, b) => (ORDER.indexOf(a) > ORDER.indexOf(b) ? a : b);

export function rate(count, seconds) {
  const perSecond = count / seconds;
  if (perSecond === 0) return '0';
  return perSecond < 0.1 ? `${(perSecond * 60).toFixed(1)}/min` : `${perSecond.toFixed(perSecond < 10 ? 1 : 0)}/s`;
}

export function duration(us) {
  if (us === null || us === undefined) return '-';
  if (us < 1000) return `${us}us`;
  return us < 1e6 ? `${(us / 1000).toFixed(1)}ms` : `${(us / 1e6).toFixed(1)}s`;
}

export function bytes(count) {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let unit = 0;
  while (count >= 10000 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${Math.round(count)} ${units[unit]}`;
}

const MARKS = { tunnel: 'mTLS', waypoint: 'mTLS, waypoint', fast: 'fast', plain: 'plain' };

export function edgeText(edge, seconds, long = false) {
  const bad = [['denied', edge.denied], ['failed', edge.failed], ['dropped', edge.dropped]]
    .filter(([, count]) => count > 0).map(([word, count]) => `${count} ${word}`);
  const parts = [MARKS[edge.path], rate(edge.opened, seconds), ...bad];
  if (long) parts.push(`p50 ${duration(edge.p50Us)}`, `p99 ${duration(edge.p99Us)}`, edge.trouble || '');
  return parts.filter(Boolean).join(', ');
}

export function totals(edges, seconds) {
  const sum = (of) => edges.reduce((all, edge) => all + of(edge), 0);
  const bad = sum((edge) => edge.denied + edge.failed + edge.dropped);
  return `${rate(sum((edge) => edge.opened), seconds)} connections${bad ? `, ${bad} in trouble` : ''}`;
}
