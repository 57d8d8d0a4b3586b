// A rate and its 95 % interval over clusters: the rule of safetyneuron/metrics/estimates.py for one training.

// Mean of zeros and ones; over several strata, of their means. quantile: of Student's t for the effective number of these clusters.
export function estimate(values, clusters, quantile, strata = values.map(() => 0)) {
  const groups = [...new Set(strata)];
  let value = 0, doubt = 0;
  const off = new Map(), shares = new Map(); // how far each cluster puts the mean off, and what it weighs
  for (const group of groups) {
    const here = values.map((one, i) => i).filter((i) => strata[i] === group);
    const weight = 1 / here.length / groups.length;
    const mean = here.reduce((total, i) => total + values[i], 0) / here.length;
    const parts = new Map();
    for (const i of here) {
      add(parts, clusters[i], (values[i] - mean) * weight);
      add(shares, clusters[i], weight);
    }
    for (const [cluster, part] of parts) add(off, cluster, part);
    value += mean / groups.length;
    if (Math.max(...[...parts.values()].map(Math.abs)) < 1e-9) doubt += 2 * weight ** 2; // all alike: as if two items might have been otherwise
  }
  const count = effectiveClusters([...shares.values()]);
  const square = off.size > 1 ? (count / (count - 1)) * squares([...off.values()]) : 0;
  return { value, interval: wilson(value, effective(value, square + doubt, values.length), quantile) };
}

const add = (totals, key, part) => totals.set(key, (totals.get(key) ?? 0) + part);
const squares = (parts) => parts.reduce((total, part) => total + part * part, 0);
const effectiveClusters = (shares) => squares(shares) ** 2 / squares(shares.map((share) => share * share));

// Independent items that would give this squared error; where all outcomes are equal, as many as there are.
function effective(value, square, trials) {
  const spread = value * (1 - value);
  return spread < 1e-12 ? trials : Math.min(trials, spread / square);
}

function wilson(p, n, z) {
  const middle = (p + z ** 2 / (2 * n)) / (1 + z ** 2 / n);
  const half = (z / (1 + z ** 2 / n)) * Math.sqrt((p * (1 - p)) / n + z ** 2 / (4 * n ** 2));
  return [Math.max(0, Math.min(p, middle - half)), Math.min(1, Math.max(p, middle + half))];
}
