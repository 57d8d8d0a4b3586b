// A rate and its 95 % interval over clusters: the rule of safetyneuron/metrics/estimates.py for one training.

// Mean of zeros and ones; over several strata, of their means. quantile: of Student's t for this number of clusters.
export function estimate(values, clusters, quantile, strata = values.map(() => 0)) {
  const groups = [...new Set(strata)];
  const sizes = new Map(groups.map((group) => [group, strata.filter((one) => one === group).length]));
  const sum = (keep) => values.reduce((total, value, i) => total + (keep(i) ? value : 0), 0);
  const means = new Map(groups.map((group) => [group, sum((i) => strata[i] === group) / sizes.get(group)]));
  const value = [...means.values()].reduce((total, mean) => total + mean / groups.length, 0);
  const off = new Map(); // how far each cluster puts the mean off
  values.forEach((one, i) => {
    const part = (one - means.get(strata[i])) / sizes.get(strata[i]) / groups.length;
    off.set(clusters[i], (off.get(clusters[i]) ?? 0) + part);
  });
  const count = off.size;
  const square = count > 1 ? (count / (count - 1)) * [...off.values()].reduce((total, part) => total + part * part, 0) : 0;
  return { value, interval: wilson(value, effective(value, square, values.length), quantile) };
}

// Independent items that would give this squared error; where all outcomes are equal, as many as there are.
function effective(value, square, trials) {
  const spread = value * (1 - value);
  if (spread < 1e-12) return trials;
  return Math.min(trials, spread / (square > 1e-18 ? square : 2 / trials ** 2)); // all clusters alike: as if two items might have been otherwise
}

function wilson(p, n, z) {
  const middle = (p + z ** 2 / (2 * n)) / (1 + z ** 2 / n);
  const half = (z / (1 + z ** 2 / n)) * Math.sqrt((p * (1 - p)) / n + z ** 2 / (4 * n ** 2));
  return [Math.max(0, Math.min(p, middle - half)), Math.min(1, Math.max(p, middle + half))];
}
