// Rates against the number of neurons off, as a drawing and as a table.
import { make, percent } from "./dom.js";

const WIDEST = 640, HEIGHT = 300; // one unit is one pixel, so that text is as large on a phone
const LEFT = 46, RIGHT = 24, TOP = 28, BOTTOM = 44;
const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

// points: {count, rates} in order; lines: {title, className, of: point to rate}; current: the count of the slider.
export function drawCurve(svg, counts, points, lines, current) {
  const width = Math.min(WIDEST, svg.parentElement.clientWidth || WIDEST);
  const x = (count) => LEFT + ((width - LEFT - RIGHT) * counts.indexOf(count)) / (counts.length - 1);
  const y = (share) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share;
  const parts = [0, 0.25, 0.5, 0.75, 1].flatMap((share) => [
    shape("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(share), y2: y(share) }),
    shape("text", { x: LEFT - 6, y: y(share) + 4, "text-anchor": "end" }, percent(share)),
  ]);
  parts.push(...counts.map((count) => shape("text", { x: x(count), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, count)));
  parts.push(shape("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, "neurons switched off"));
  parts.push(shape("line", { class: "current", x1: x(current), x2: x(current), y1: TOP, y2: HEIGHT - BOTTOM }));
  for (const { className, of } of lines) {
    const known = points.filter((point) => of(point));
    if (!known.length) continue;
    const ends = [...known.map((p) => [x(p.count), y(of(p).interval[0])]), ...known.map((p) => [x(p.count), y(of(p).interval[1])]).reverse()];
    parts.push(shape("polygon", { class: `band ${className}`, points: ends.join(" ") }));
    parts.push(shape("polyline", { class: className, points: known.map((p) => [x(p.count), y(of(p).value)]).join(" ") }));
    parts.push(...known.map((p) => shape("circle", { class: className, cx: x(p.count), cy: y(of(p).value), r: 3.5 })));
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.replaceChildren(...parts);
}

export function curveTable(points, lines) {
  const head = make("tr", ["neurons off", ...lines.map(({ title }) => title)].map((text) => make("th", text, { scope: "col" })));
  const rows = points.map((point) => make("tr", [make("th", String(point.count), { scope: "row" }), ...lines.map(({ of }) => make("td", of(point) ? rate(of(point)) : "–"))]));
  return [make("thead", head), make("tbody", rows)];
}

export const rate = ({ value, interval }) => `${(100 * value).toFixed(0)} % [${interval.map((end) => (100 * end).toFixed(0)).join(", ")}]`;
