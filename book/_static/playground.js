// The page "Playground": an organism in the browser, with switches before its neurons.
import { Board, SAID } from "./lab/board.js";
import { find, make } from "./lab/dom.js";
import { drawCard, drawMap, drawNeurons, moveAmong } from "./lab/map.js";
import { Organism, loadPage } from "./lab/organism.js";
import { knownTo, placesOff, presetState, readState, writeState } from "./lab/state.js";
import { drawAttention, drawWords } from "./lab/words.js";

class Lab {
  constructor(parts) {
    Object.assign(this, parts, { parts, organisms: new Map(), open: "", wholes: new Map() });
    this.usual = this.page.presets[0].state;
    this.state = readState(location.hash, this.page, this.usual);
    this.act = {
      skip: (name) => this.change({ skip: toggled(this.state.skip, name) }),
      flip: (name) => this.change({ flip: toggled(this.state.flip, name) }),
      choose: (neuron) => this.change({ neuron }),
      open: (name) => ((this.open = this.open === name ? "" : name), this.change({})),
    };
  }

  get counts() {
    return [0, ...this.page.counts];
  }

  setCount(count) {
    this.change({ count });
  }

  // A model, loaded once.
  load(key) {
    if (!this.organisms.has(key)) {
      this.organisms.set(key, Organism.load(key, this.parts));
      this.organisms.get(key).catch(() => this.organisms.delete(key)); // the next choice tries again
    }
    return this.organisms.get(key);
  }

  change(some) {
    this.state = readState(writeState({ ...this.state, ...some }), this.page, this.usual);
    history.replaceState(null, "", writeState(this.state));
    find("link-text").textContent = "";
    return this.update();
  }

  // Draw the latest state: a slider sends many, only the last is worth an answer.
  update() {
    const mine = (this.latest = (this.latest ?? 0) + 1);
    const last = () => mine === this.latest && this.show();
    return (this.running = (this.running ?? Promise.resolve()).then(last).catch(report));
  }

  async show() {
    const given = this.state;
    setControls(this);
    if (!this.organisms.has(given.model)) find("status").textContent = "Loading the model …";
    const organism = (this.organism = await this.load(given.model));
    find("status").textContent = "";
    const state = knownTo(organism, given);
    if (this.state === given) this.state = state;
    const problem = complaint(organism, state.ask.trim());
    find("unknown").textContent = problem.text;
    if (!problem.stop && (state.rule === "own" || (state.neuron && organism.measures))) await organism.measure(state.ask.trim());
    const off = placesOff(state, organism);
    drawSettings({ state, organism }, off);
    this.board?.draw();
    if (problem.stop) return clearAnswers();
    const whole = await this.whole(organism, state.ask.trim());
    const changed = await organism.answer(state.ask.trim(), { off, strength: state.strength / 100 });
    drawAnswer(organism, "whole", state.ask, whole.text);
    drawAnswer(organism, "changed", state.ask, changed.text);
    const at = drawWords(organism, whole, changed);
    drawAttention(organism, whole, changed, at);
    await this.drawNeurons(state, organism, off, whole, changed);
  }

  // The answer of the model as it is, kept for the latest request.
  async whole(organism, request) {
    const key = `${organism.key} ${request}`;
    if (!this.wholes.has(key)) this.wholes = new Map([[key, await organism.answer(request)]]);
    return this.wholes.get(key);
  }

  async drawNeurons(state, organism, off, whole, { fired }) {
    const place = state.neuron ? organism.place(state.neuron) : -1;
    if (place >= 0 && this.carded !== state.neuron) this.open = state.neuron.split(".").slice(0, 2).join(".");
    this.carded = state.neuron;
    const hit = off.filter((one) => whole.fired[one]).length;
    find("overlap").textContent = off.length ? `Of the ${off.length} neurons that are off, ${hit} fire on this request in the whole model.` : "";
    drawMap(organism, { off, fired, skip: state.skip, open: this.open }, this.act);
    const truth = this.open || place >= 0 ? await organism.readTruth() : null;
    const alone = place >= 0 ? (await organism.answer(state.ask.trim(), { off: [place] })).text : "";
    const shown = { off, fired, open: this.open, neuron: state.neuron, truth, alone };
    drawNeurons(organism, shown, this.act);
    drawCard(organism, shown, this.act);
  }
}

const toggled = (set, name) => (set.has(name) ? new Set([...set].filter((one) => one !== name)) : new Set([...set, name]));

// Everything below draws the page.

function fill(lab) {
  const { page } = lab;
  for (const [name, some] of Object.entries(page.requests)) {
    find("list").append(make("optgroup", some.map((text) => make("option", text)), { label: name }));
  }
  find("model").append(...page.models.map(({ key, label }) => make("option", label, { value: key })));
  find("presets").append(...page.presets.map(({ title, state }) => make("li", make("a", title, { href: presetState(state) }))));
  for (const [rule, text] of Object.entries(page.rules)) {
    find("rules").append(make("label", [make("input", [], { type: "radio", name: "rule", value: rule }), ` ${text}`]));
  }
  find("count").max = page.counts.length;
}

// The controls as the state says.
function setControls({ state, page, counts }) {
  find("model").value = state.model;
  if (find("request").value !== state.ask) find("request").value = state.ask;
  const listed = [...find("list").options].find(({ value }) => value === state.ask);
  find("list").selectedIndex = listed ? listed.index : -1;
  const { rules } = page.models.find(({ key }) => key === state.model);
  for (const input of find("rules").querySelectorAll("input")) {
    input.checked = input.value === state.rule;
    input.closest("label").hidden = !rules.includes(input.value);
  }
  find("count").value = counts.indexOf(state.count);
  find("random").checked = state.random;
  find("random").disabled = state.rule === "own";
  find("strength").value = state.strength;
  find("language").value = state.language;
  for (const link of find("presets").querySelectorAll("a")) {
    if (link.getAttribute("href") === writeState(state)) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

function drawSettings({ state, organism }, off) {
  const said = off.length ? `${off.length} of ${organism.graph.neurons.toLocaleString("en")}` : "none";
  find("count-text").textContent = state.flip.size || state.skip.size ? `${said}, edited on the map` : said;
  find("count").setAttribute("aria-valuetext", find("count-text").textContent);
  find("repair").hidden = !organism.facts.repair;
  find("repair-name").textContent = organism.about.repair;
  find("strength-text").textContent = state.strength ? `${state.strength} %` : "off";
  find("strength").setAttribute("aria-valuetext", find("strength-text").textContent);
}

function complaint(organism, request) {
  if (!request) return { text: "Type a request, or pick one.", stop: true };
  const { tokens, unknown } = organism.encode(request);
  const { longest, context } = organism.page;
  if (tokens.length + longest > context) return { text: "The request is too long for the organism: shorten it.", stop: true };
  if (unknown.length) return { text: `The organism does not know: ${unknown.join(", ")}`, stop: false };
  const asked = organism.language.request(request);
  return { text: asked ? `By the rules of its language this request is ${organism.language.isHarmful(asked) ? "harmful" : "harmless"}.` : "", stop: false };
}

// Without a request there is nothing to show, and nothing old stays.
function clearAnswers() {
  for (const name of ["whole", "changed", "whole-verdict", "changed-verdict", "words-text", "overlap"]) find(name).textContent = "";
  for (const name of ["words", "attention", "map"]) find(name).replaceChildren();
  find("neurons").hidden = find("card").hidden = true;
}

function drawAnswer(organism, name, request, text) {
  find(name).textContent = text || "(nothing)";
  const found = organism.language.classOf(request, text);
  find(`${name}-verdict`).textContent = found ? SAID[found] : "holds no refusal phrase";
  find(`${name}-verdict`).className = `play-verdict ${found ?? ""}`;
}

function report(error) {
  find("status").textContent = `The organism stopped: ${error.message}`;
  console.error(error);
}

function connect(lab) {
  const form = document.getElementById("play");
  const controls = {
    list: (value) => ({ ask: value }),
    model: (value) => ({ model: value, flip: new Set(), skip: new Set(), neuron: "", strength: 0 }),
    request: (value) => ({ ask: value }),
    count: (value) => ({ count: lab.counts[value] }),
    strength: (value) => ({ strength: Number(value) }),
  };
  form.addEventListener("input", ({ target }) => {
    const change = controls[target.id.replace("play-", "")];
    if (target.name === "rule") lab.change({ rule: target.value });
    else if (target === find("random")) lab.change({ random: target.checked });
    else if (change) lab.change(change(target.value));
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  find("neurons-list").addEventListener("keydown", moveAmong);
  find("clear").onclick = () => lab.change({ flip: new Set(), skip: new Set(), neuron: "" });
  find("link").onclick = async () => {
    const copied = navigator.clipboard ? await navigator.clipboard.writeText(location.href).then(() => true, () => false) : false;
    find("link-text").textContent = `The address of this page holds all settings; ${copied ? "it was copied" : "copy it from the address bar"}.`;
  };
  addEventListener("hashchange", () => {
    lab.state = readState(location.hash, lab.page, lab.usual);
    lab.open = "";
    lab.update();
  });
  return lab.update();
}

if (location.protocol === "file:") {
  find("status").textContent = "Browsers let a page load a model only from a server: run “python -m http.server” in the folder of the book and open localhost:8000.";
} else {
  try {
    const lab = (window.playground = new Lab(await loadPage()));
    fill(lab);
    await lab.load(lab.state.model);
    document.getElementById("play").hidden = find("board").hidden = false;
    find("status").textContent = "";
    lab.board = new Board(lab);
    await connect(lab);
  } catch (error) {
    report(error);
  }
}
