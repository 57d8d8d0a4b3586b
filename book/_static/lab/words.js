// Where two answers part: the likeliest next words there, and where the models look when they choose.
import { find, make, percent } from "./dom.js";

const heading = (texts) => make("thead", make("tr", texts.map((text) => make("th", text, { scope: "col" }))));

// The next words at the first place where the answers part, else at the start; gives that place.
export function drawWords(organism, whole, changed) {
  const part = whole.tokens.findIndex((token, i) => token !== changed.tokens[i]);
  const at = Math.max(0, part);
  const before = organism.decode(whole.tokens.slice(0, at));
  const where = before ? `after “${before}”` : "at the first word";
  find("words-text").textContent =
    part < 0 ? "Both give the same answer. The likeliest first words:" : `The answers part ${where}. The likeliest next words there:`;
  const words = [...new Set([whole, changed].flatMap(({ steps }) => steps[at].top))];
  const rows = words.map((token) =>
    make("tr", [make("th", organism.word(token), { scope: "row" }), ...[whole, changed].map(({ steps }) => chanceCell(steps[at].shares[token]))]),
  );
  find("words").replaceChildren(heading(["word", "whole model", "as set"]), make("tbody", rows));
  return at;
}

function chanceCell(share) {
  const cell = make("td", share < 0.0005 ? "< 0.1 %" : percent(share, 1), { className: "chance" });
  cell.style.setProperty("--share", `${100 * share}%`);
  return cell;
}

// How much of its attention each layer gives to each word when it chooses the word at a place, before and after.
export function drawAttention(organism, whole, changed, at) {
  const words = [...whole.asked, ...whole.tokens.slice(0, at)];
  const layers = [...Array(organism.facts.layers).keys()];
  const rows = words.map((token, i) => {
    const cells = layers.map((layer) => shareCell(...[whole, changed].map(({ steps }) => steps[at].attention[layer * words.length + i])));
    return make("tr", [make("th", organism.word(token), { scope: "row" }), ...cells]);
  });
  find("attention").replaceChildren(heading(["word", ...layers.map((layer) => `layer ${layer + 1}`)]), make("tbody", rows));
}

function shareCell(before, after) {
  const texts = [before, after].map((share) => (100 * share).toFixed(0));
  const cell = make("td", texts[0] === texts[1] ? texts[0] : texts.join(" → "));
  cell.style.setProperty("--share", `${Math.min(60, 120 * after)}%`);
  if (Math.abs(after - before) >= 0.1) cell.className = "moved";
  return cell;
}
