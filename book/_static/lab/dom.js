// Small helpers to draw with.
export const find = (name) => document.getElementById(`play-${name}`);
export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

export function make(tag, content = [], options = {}) {
  const { dataset = {}, attributes = {}, ...rest } = options;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, dataset);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...[content].flat());
  return element;
}

export const button = (text, act, options = {}) => make("button", text, { type: "button", onclick: act, ...options });
