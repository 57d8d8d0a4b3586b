// The state of the page: what is asked, which neurons are off, how strong the repair is. It is the part of the address after #.
const WHOLE = /^\d+$/;

// The state that an address gives; what it leaves out or gets wrong is as in `usual`.
export function readState(hash, page, usual) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const model = page.models.find(({ key }) => key === given.get("model")) ?? page.models.find(({ key }) => key === usual.model);
  const number = (name, most, otherwise) => (WHOLE.test(given.get(name) ?? "") ? Math.min(most, Number(given.get(name))) : otherwise);
  return {
    model: model.key,
    rule: model.rules.includes(given.get("rule")) ? given.get("rule") : model.rules.includes(usual.rule) ? usual.rule : model.rules[0],
    count: nearest(page.counts, number("count", Infinity, given.has("model") ? 0 : usual.count)),
    random: given.get("random") === "1" && given.get("rule") !== "own",
    strength: number("strength", 150, 0),
    skip: new Set((given.get("skip") ?? "").split(",").filter(Boolean)),
    flip: new Set((given.get("flip") ?? "").split(",").filter(Boolean)),
    neuron: given.get("neuron") ?? "",
    language: given.get("language") in page.languages ? given.get("language") : "en",
    ask: given.get("ask") ?? usual.ask,
  };
}

const nearest = (counts, wanted) => [0, ...counts].filter((count) => count <= wanted).at(-1);

export function writeState(state) {
  const { random, strength, skip, flip, neuron, language, ...always } = state;
  const given = new URLSearchParams(always);
  if (random) given.set("random", "1");
  if (strength) given.set("strength", strength);
  for (const [name, some] of Object.entries({ skip, flip })) if (some.size) given.set(name, [...some].join(","));
  if (neuron) given.set("neuron", neuron);
  if (language !== "en") given.set("language", language);
  return `#${given}`;
}

// What a preset leaves out: no neuron flipped, none skipped, no repair.
export const presetState = (state) => writeState({ random: 0, strength: 0, skip: new Set(), flip: new Set(), neuron: "", language: "en", ...state });

// A state without what an address names that the model does not have.
export function knownTo(organism, state) {
  const layer = (name) => WHOLE.test(name) && name >= 1 && name <= organism.facts.layers;
  const flip = [...state.flip].filter((name) => organism.place(name) >= 0);
  const skip = [...state.skip].filter((name) => name in organism.facts.widths || layer(name));
  return { ...state, flip: new Set(flip), skip: new Set(skip) };
}

// Flat places of the neurons that a state switches off, in the order of its rule.
export function placesOff(state, organism, count = state.count) {
  const list = organism.orderOf(state.rule, state.random).slice(0, count);
  const kept = list.filter((place) => {
    const [kind, layer] = organism.unit(place);
    return !state.skip.has(kind) && !state.skip.has(String(layer + 1));
  });
  const off = new Set(kept);
  for (const name of state.flip) {
    const place = organism.place(name);
    if (place >= 0 && !off.delete(place)) off.add(place);
  }
  return [...off];
}
