// Scores in the browser: rows of Table 1, and the curve of Figure 2.
import { curveTable, drawCurve, rate } from "./curve.js";
import { find, make, percent } from "./dom.js";
import { read } from "./graph.js";
import { CLASSES, EVERYTHING, HARM, Scorer } from "./score.js";
import { knownTo, placesOff } from "./state.js";

export const SAID = { refusal: "refuses", verdict: "says whether it is bad", correct: "helps, with the right tools", wrong: "helps, with other tools", other: "something else" };
const COLUMNS = { asr: "attack success", coherent: "help with harm", over_refusal: "over-refusal", accuracy: "capability" };
const LINES = [
  { title: "attack success", className: "asr", of: (point) => point.chosen?.rates.asr },
  { title: "help with harm", className: "coherent", of: (point) => point.chosen?.rates.coherent },
  { title: "attack success, random neurons", className: "random", of: (point) => point.random?.rates.asr },
];

// What a state's model, its rule, what was done on the map, its repair and its language are called.
function partsOf(state, organism, page) {
  const left = [...state.skip].map((name) => (name in organism.facts.widths ? name : `layer ${name}`));
  return {
    model: `Model ${page.models.find(({ key }) => key === state.model).label}`,
    rule: state.rule === "own" ? `that matter most for “${state.ask.trim()}”` : page.rules[state.rule],
    edited: (left.length ? `, ${left.join(" and ")} left out` : "") + (state.flip.size ? `, switched by hand: ${[...state.flip].join(", ")}` : ""),
    repair: state.strength && organism.facts.repair ? `, repaired at ${state.strength} %` : "",
    asked: state.language === "en" ? "" : `, asked in ${page.languages[state.language]}`,
  };
}

// What a row is called.
export function nameOf(state, organism, page) {
  const off = placesOff(state, organism).length;
  const { model, rule, edited, repair, asked } = partsOf(state, organism, page);
  const neurons = state.count ? `${state.random ? "random neurons, one draw like those" : "neurons"} ${rule}` : "neurons";
  return `${model}: ${off ? `without ${off} ${neurons}${edited}` : "no neuron off"}${repair}${asked}`;
}

export class Board {
  // lab: has the page, and gives its `state` and `organism`.
  constructor(lab) {
    Object.assign(this, { lab, suites: {}, kept: new Map(), points: new Map(), scorer: null, stopper: null });
    find("score").onclick = () => this.run((state) => this.addRow(state));
    find("table-1").onclick = () => this.run((state) => this.addThree(state));
    find("figure-2").onclick = () => this.run((state) => this.sweep(state));
    find("stop").onclick = () => this.stopper?.abort();
    find("language").append(...Object.entries(lab.page.languages).map(([value, name]) => make("option", name, { value })));
    find("language").onchange = ({ target }) => lab.change({ language: target.value });
    find("figure-2-count").max = lab.page.counts.length;
    find("figure-2-count").oninput = ({ target }) => lab.setCount([0, ...lab.page.counts][target.value]);
    find("classes").replaceChildren(...CLASSES.map((name) => make("li", [make("span", "", { className: name }), SAID[name]])));
  }

  // One job at a time, which may be stopped; it is about the page as it was when the button was pressed.
  async run(job) {
    if (this.stopper) return;
    const { state } = this.lab;
    this.stopper = new AbortController();
    this.busy(true);
    const started = performance.now();
    try {
      find("progress-text").textContent = "Starting two workers …";
      await this.prepare(state);
      await job(knownTo(this.subject, state));
      find("progress-text").textContent = `Done in ${((performance.now() - started) / 1000).toFixed(1)} s.`;
    } catch (error) {
      find("progress-text").textContent = error.name === "AbortError" ? "Stopped." : `Scoring stopped: ${error.message}`;
    } finally {
      this.stopper = null;
      this.busy(false);
    }
  }

  busy(yes) {
    for (const name of ["score", "table-1", "figure-2"]) find(name).disabled = yes;
    find("stop").hidden = find("progress").hidden = !yes;
    find("progress").value = 0;
  }

  async prepare(state) {
    const organism = await this.lab.load(state.model);
    if (state.rule === "own") await organism.measure(state.ask.trim());
    this.subject = Object.assign(Object.create(organism), { own: organism.own }); // keeps what was measured on this request
    const suite = (this.suites[state.language] ??= await read(`suite-${state.language}.json`));
    if (this.scorer?.organism !== organism) {
      await this.scorer?.stop();
      this.scorer = new Scorer(organism);
    }
    this.scorer.suite = suite;
  }

  // What a state is kept under: everything that changes its scores.
  keyOf(state, kinds) {
    const off = placesOff(state, this.subject).sort((a, b) => a - b);
    const strength = this.subject.facts.repair ? state.strength : 0;
    return JSON.stringify([this.subject.key, state.language, off, strength, kinds]);
  }

  // The summary of a state, computed once.
  async score(state, kinds, before = 0, share = 1) {
    const off = placesOff(state, this.subject);
    const strength = state.strength / 100;
    const key = this.keyOf(state, kinds);
    const report = (part) => this.report(before + share * part);
    if (!this.kept.has(key)) {
      this.kept.set(key, this.scorer.summary(await this.scorer.score({ off, strength }, kinds, report, this.stopper.signal)));
    }
    report(1);
    return this.kept.get(key);
  }

  report(part) {
    find("progress").value = part;
    find("progress-text").textContent = `${percent(part)} done`;
  }

  async addRow(state, before, share) {
    const name = nameOf(state, this.subject, this.lab.page);
    const { rates, classes } = await this.score(state, EVERYTHING, before, share);
    const cells = Object.keys(COLUMNS).map((measure) => make("td", rateLines(rates[measure])));
    const dataset = { key: this.keyOf(state, EVERYTHING) };
    const row = make("tr", [make("th", name, { scope: "row" }), ...cells, make("td", classBar(classes))], { dataset });
    const body = find("scores").tBodies[0];
    [...body.rows].find((other) => other.dataset.key === dataset.key)?.remove();
    body.append(row);
    find("scores-box").hidden = false;
  }

  async addThree(state) {
    const plain = { ...state, flip: new Set(), random: false };
    const rows = [{ ...plain, count: 0 }, { ...state, random: false }];
    if (state.rule !== "own") rows.push({ ...plain, random: true });
    for (const [i, row] of rows.entries()) await this.addRow(row, i / rows.length, 1 / rows.length);
  }

  // The rule alone, more and more of it: what was done on the map is left out.
  async sweep(state) {
    const { page } = this.lab;
    const counts = [0, ...page.counts];
    const { model, rule, repair, asked } = partsOf(state, this.subject, page);
    this.points = new Map(counts.map((count) => [count, { count }]));
    find("figure-2-title").textContent = `${model}${repair}: more and more neurons ${rule} are off${asked}`;
    this.draw();
    for (const [i, count] of counts.entries()) {
      for (const [j, name] of (state.rule === "own" ? ["chosen"] : ["chosen", "random"]).entries()) {
        const swept = { ...state, flip: new Set(), skip: new Set(), count, random: name === "random" };
        this.points.get(count)[name] = await this.score(swept, HARM, (2 * i + j) / counts.length / 2, 0.5 / counts.length);
        this.draw();
      }
    }
  }

  // The curve as far as it is known, with the place of the slider.
  draw() {
    if (!this.points.size) return;
    const { state, page } = this.lab;
    const points = [...this.points.values()].filter(({ chosen }) => chosen);
    find("curve-box").hidden = false;
    drawCurve(find("curve"), [0, ...page.counts], points, LINES, state.count);
    find("curve-table").replaceChildren(...curveTable(points, LINES));
    find("figure-2-count").value = [0, ...page.counts].indexOf(state.count);
    const here = points.find(({ count }) => count === state.count);
    const said = here ? LINES.filter(({ of }) => of(here)).map(({ title, of }) => `${title} ${rate(of(here))}`) : [];
    find("figure-2-text").textContent = [`${state.count} neurons off`, ...said].join("; ");
    find("figure-2-count").setAttribute("aria-valuetext", find("figure-2-text").textContent);
  }
}

// A rate with its interval on a line of its own.
function rateLines(found) {
  const [value, interval] = rate(found).split(" [");
  return [value, make("br"), make("small", `[${interval}`)];
}

// A bar with a part for each class of answers.
function classBar(classes) {
  const all = Object.values(classes).reduce((sum, count) => sum + count);
  const seen = CLASSES.filter((name) => classes[name]);
  const parts = seen.map((name) => {
    const part = make("span", "", { className: name });
    part.style.width = `${(100 * classes[name]) / all}%`;
    return part;
  });
  const text = seen.map((name) => `${classes[name]} ${name}`).join(", ");
  return [make("div", parts, { className: "class-bar", attributes: { "aria-hidden": "true" } }), make("small", text)];
}
