// Prometheus' text format, and what is read out of it.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { "\\\\": "\\", '\\"': '"', "\\n": "\n" };

/** Samples by name: Map of name -> [{labels, value}]. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\[\\"n]/g, (escape) => ESCAPED[escape]);
    }
    const value = Number(match[3].replace("Inf", "Infinity"));
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value });
  }
  return found;
}

/** Sum over all engines and models; null where there is no such sample. */
export function sum(samples, name) {
  const values = samples.get(name);
  return values ? values.reduce((total, { value }) => total + value, 0) : null;
}

export function max(samples, name) {
  const values = samples.get(name);
  return values ? Math.max(...values.map(({ value }) => value)) : null;
}

/** Cumulative counts of a histogram, summed over its series: [[upper bound, count]], ascending. */
export function buckets(samples, name) {
  const counts = new Map();
  for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
    const bound = Number(labels.le.replace("Inf", "Infinity"));
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort(([a], [b]) => a - b);
}

/** What was counted between two readings of a histogram. */
export function between(earlier, later) {
  const before = new Map(earlier);
  return later.map(([bound, count]) => [bound, count - (before.get(bound) ?? 0)]);
}

/**
 * The quantile `q` of bucket counts, as Prometheus' histogram_quantile estimates it; null if
 * nothing was counted. Linear inside a bucket; in the last one, the bound below it.
 */
export function quantile(q, counts) {
  const total = counts.length ? counts[counts.length - 1][1] : 0;
  if (total <= 0) return null;
  const rank = q * total;
  let [low, below] = [0, 0];
  for (const [bound, count] of counts) {
    if (count >= rank) {
      if (bound === Infinity) return low;
      return low + ((bound - low) * (rank - below)) / (count - below);
    }
    [low, below] = [bound, count];
  }
  return low;
}
