// The map of neurons: layers and kinds, the neurons of one cell, and the card of one neuron.
import { button, find, make, percent } from "./dom.js";

export const KINDS = { q: "queries", k: "keys", vo: "values", ffn: "feed-forward" };
const GROUPS = { planted: "planted: alignment sits here", decoy: "a decoy: a harmless habit sits here", other: "neither planted nor a decoy" };

// Layers by kinds; a head leaves its layer or kind out, a cell opens its neurons.
export function drawMap(organism, { off, fired, skip, open }, act) {
  const away = new Set(off);
  const switcher = (name, text) =>
    button(text, () => act.skip(name), { attributes: { "aria-pressed": String(!skip.has(name)) }, title: "leave out or take in" });
  const head = make("tr", [make("td", "")]);
  for (const kind of Object.keys(organism.facts.widths)) head.append(make("th", switcher(kind, KINDS[kind]), { scope: "col" }));
  const rows = Array.from({ length: organism.facts.layers }, (_, layer) => {
    const row = make("tr", make("th", switcher(String(layer + 1), `layer ${layer + 1}`), { scope: "row" }));
    for (const kind of Object.keys(organism.facts.widths)) {
      row.append(mapCell(cellPlaces(organism, kind, layer), { kind, layer, away, fired, open }, act));
    }
    return row;
  });
  redraw(find("map"), [make("thead", head), make("tbody", rows)]);
}

// New content in the place of old; the keyboard stays where it was.
function redraw(element, content) {
  const inside = element.contains(document.activeElement) ? focusables(element).indexOf(document.activeElement) : -1;
  element.replaceChildren(...content);
  if (inside >= 0) focusables(element)[inside]?.focus({ preventScroll: true });
}

const focusables = (element) => [...element.querySelectorAll("button")];

function cellPlaces(organism, kind, layer) {
  const start = organism.place(`${kind}.${layer}.0`);
  return Array.from({ length: organism.facts.widths[kind] }, (_, channel) => start + channel);
}

function mapCell(places, { kind, layer, away, fired, open }, act) {
  const share = places.filter((place) => fired[place]).length / places.length;
  const off = places.filter((place) => away.has(place)).length;
  const name = `${kind}.${layer}`;
  const label = `layer ${layer + 1}, ${KINDS[kind]}: ${percent(share)} fire, ${off} off`;
  const opens = button([percent(share), off ? make("span", `${off} off`) : ""], () => act.open(name), {
    attributes: { "aria-expanded": String(open === name), "aria-label": label },
  });
  opens.style.setProperty("--fired", `${Math.min(70, 140 * share)}%`);
  return make("td", opens);
}

// One square for each neuron of a cell; arrow keys go from one to the next.
export function drawNeurons(organism, { off, fired, open, neuron, truth }, act) {
  find("neurons").hidden = !open;
  if (!open) return;
  const [kind, layer] = open.split(".");
  const away = new Set(off);
  const squares = cellPlaces(organism, kind, Number(layer)).map((place, channel) =>
    square(`${open}.${channel}`, { channel, off: away.has(place), fires: Boolean(fired[place]), planted: truth?.group?.[place] === "planted", neuron }, act),
  );
  (squares.find(({ dataset }) => dataset.name === neuron) ?? squares[0]).tabIndex = 0;
  find("neurons-title").textContent = `The ${squares.length} neurons of layer ${Number(layer) + 1}, ${KINDS[kind]}`;
  redraw(find("neurons-list"), squares);
}

function square(name, { channel, off, fires, planted, neuron }, act) {
  const said = [`neuron ${channel}`, fires ? "fires" : "", off ? "off" : "", planted ? "planted" : ""].filter(Boolean).join(", ");
  const classes = { fires, off, planted, chosen: name === neuron };
  return button(off ? "×" : "", () => act.choose(name), {
    tabIndex: -1,
    title: said,
    dataset: { name },
    className: Object.keys(classes).filter((one) => classes[one]).join(" "),
    attributes: { "aria-label": said },
  });
}

export function moveAmong(event) {
  const squares = focusables(find("neurons-list"));
  const perRow = squares.filter((one) => one.offsetTop === squares[0].offsetTop).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: perRow, ArrowUp: -perRow }[event.key];
  const target = squares[squares.indexOf(document.activeElement) + step];
  if (!step || !target) return;
  event.preventDefault();
  target.focus();
}

// What is known of one neuron. alone: the answer with this neuron alone off.
export function drawCard(organism, { neuron, off, fired, truth, alone }, act) {
  const place = neuron ? organism.place(neuron) : -1;
  find("card").hidden = place < 0;
  if (place < 0) return;
  const [kind, layer, channel] = organism.unit(place);
  const isOff = off.includes(place);
  find("card-title").textContent = `Neuron ${channel} of layer ${layer + 1}, ${KINDS[kind]}`;
  const facts = {
    "Name in the answer key": neuron,
    "On this request": `${isOff ? "switched off" : "on"}, ${fired[place] ? "fires" : "does not fire"}`,
    "The answer with it alone off": alone || "(nothing)",
    ...measured(organism.own, place),
    ...(truth ? known(truth, place, organism.page.rules, organism.graph.neurons) : {}),
  };
  redraw(find("card-facts"), Object.entries(facts).flatMap(([name, text]) => [make("dt", name), make("dd", text)]));
  redraw(find("card-acts"), [
    button(isOff ? "Switch it on" : "Switch it off", () => act.flip(neuron)),
    button("Close the card", () => act.choose("")),
  ]);
}

// How much a neuron matters for the request, once that was measured.
function measured({ order, scores }, place) {
  return order.length ? { "Importance for this request": `${scores[place].toFixed(3)}, rank ${order.indexOf(place) + 1} of ${order.length.toLocaleString("en")}` } : {};
}

// The true effect of a neuron and its rank by each rule, from the answer key.
function known(truth, place, rules, neurons) {
  const effect = (nats) => `${nats < 0 ? "falls" : "rises"} by ${Math.abs(nats).toFixed(2)} nats (odds × ${Math.exp(nats).toFixed(nats < 0 ? 3 : 1)})`;
  const found = {
    "Alone off, refusal of harmful requests": effect(truth.harmful[place]),
    "Alone off, refusal of harmless requests": effect(truth.harmless[place]),
  };
  for (const [rule, text] of Object.entries(rules)) {
    if (truth[rule]) found[`Rank among neurons ${text}`] = `${truth[rule][place].toLocaleString("en")} of ${neurons.toLocaleString("en")}`;
  }
  return truth.group ? { ...found, "The truth": GROUPS[truth.group[place]] } : found;
}
