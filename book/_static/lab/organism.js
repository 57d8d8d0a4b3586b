// An organism to talk to: its graph, the words it knows, and what its answers are.
import { Graph, Importance, library, likeliest, read } from "./graph.js";
import { Language } from "./language.js";

const TOP = 5; // words of a distribution that are shown

export async function loadPage() {
  const names = ["page.json", "tokenizer.json", "tokenizer_config.json"];
  const [{ Tokenizer }, page, ...words] = await Promise.all([library("tokenizers"), ...names.map(read)]);
  return { page, tokenizer: new Tokenizer(...words), language: new Language(page.language) };
}

export class Organism {
  static async load(key, { page, tokenizer, language }) {
    return new Organism(key, await Graph.load(key, page), { page, tokenizer, language });
  }

  constructor(key, graph, parts) {
    Object.assign(this, { key, graph, facts: graph.facts }, parts);
    this.about = parts.page.models.find((model) => model.key === key);
    this.measures = this.about.rules.includes("own"); // importance of a request
    this.truth = null;
    this.own = { request: "", order: [], scores: [] }; // what was measured on the latest request
  }

  // Importance of every neuron for a request, and the neurons by it.
  async measure(request) {
    if (this.own.request === request) return;
    this.importance ??= await Importance.load(this.key, this.facts.widths);
    const scores = await this.importance.ofNeurons(this.encode(request).tokens);
    this.own = { request, scores, order: byScore(scores) };
  }

  // The neurons of a rule, the first to be switched off first; or random ones like them.
  orderOf(rule, random) {
    return rule === "own" ? this.own.order : this.facts[random ? "random" : "orders"][rule];
  }

  // Token ids of the request in the chat template, and its words that the tokenizer does not know.
  encode(request) {
    const ids = (text) => this.tokenizer.encode(text, { add_special_tokens: false }).ids;
    const unknown = request.split(/\s+/).filter((word) => word && ids(word).includes(this.page.unknown));
    return { tokens: ids(this.page.before + request + this.page.after), unknown };
  }

  decode(tokens) {
    return tokens.length ? this.tokenizer.decode(tokens, { skip_special_tokens: true }).trim() : "";
  }

  word(token) {
    return token === this.page.end ? "(end)" : this.tokenizer.decode([token], { skip_special_tokens: false }).trim();
  }

  // Greedy answer, its tokens, at each of them the likeliest words and where the model looks, and which neurons fired on the request.
  async answer(request, { off = [], strength = 0 } = {}) {
    const steps = [];
    let fired;
    const see = (found) => {
      fired ??= found.fired;
      steps.push({ ...chances(found.logits), attention: found.attention });
    };
    const asked = this.encode(request).tokens;
    const [tokens] = await this.graph.complete([asked], this.graph.setting(off, strength), see);
    return { text: this.decode(tokens), asked, tokens, steps, fired };
  }

  // Where the layers and kinds of a place are: [kind, layer, channel].
  unit(place) {
    const layer = Math.floor(place / this.graph.width);
    let channel = place % this.graph.width;
    for (const [kind, width] of Object.entries(this.facts.widths)) {
      if (channel < width) return [kind, layer, channel];
      channel -= width;
    }
    return null;
  }

  // The flat place of a unit written as in the answer key (ffn.0.118), or -1.
  place(name) {
    const [kind, layer, channel] = name.split(".").map((part, i) => (i ? Number(part) : part));
    const kinds = Object.keys(this.facts.widths);
    const inside = kinds.includes(kind) && layer >= 0 && layer < this.facts.layers && channel >= 0 && channel < this.facts.widths[kind];
    if (!inside || !Number.isInteger(layer) || !Number.isInteger(channel)) return -1;
    const before = kinds.slice(0, kinds.indexOf(kind)).reduce((sum, one) => sum + this.facts.widths[one], 0);
    return layer * this.graph.width + before + channel;
  }

  // What the answer key says of every neuron; null where it says nothing of this model.
  async readTruth() {
    if (this.facts.truth) this.truth ??= await read(`${this.key}-truth.json`);
    return this.truth;
  }
}

const byScore = (scores) => [...scores.keys()].sort((a, b) => scores[b] - scores[a]);

// Probabilities of all tokens, and the likeliest of them.
function chances(logits) {
  const most = logits[likeliest(logits, 0, logits.length)];
  const parts = logits.map((value) => Math.exp(value - most));
  const sum = parts.reduce((total, part) => total + part);
  const shares = parts.map((part) => part / sum);
  return { shares, top: byScore(shares).slice(0, TOP) };
}
