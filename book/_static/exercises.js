// Exercises on the page: a guess that the page remembers, and in words how far it is from what the run found.
// safetyneuron/book/exercises.py says the same in the notebooks.
function readNumbers(text) {
  const plain = text.replace(/\[[^\]]*\]|(?<=\d),(?=\d{3}(?!\d))/g, "").replace(/(?<=\d),(?=\d)/g, ".").replaceAll("−", "-");
  return plain.match(/(?<![\d.])-?\d+(?:\.\d+)?/g) ?? [];
}

function judgeNumber(said, right) {
  const digits = (right.split(".")[1] ?? "").length;
  const [guess, answer] = [Number(said), Number(right)];
  const near = Math.max(0.02 * Math.abs(answer), 0.5 * 10 ** -digits) + 1e-12;
  if (Math.abs(guess - answer) <= near) return "right";
  if (Math.abs(guess + answer) <= near) return "right size, wrong sign";
  if (answer && Math.min(Math.abs(100 * guess - answer), Math.abs(guess / 100 - answer)) <= near)
    return "a factor of 100 apart: a share for a percentage, perhaps";
  const far = Math.abs(guess - answer) > Math.max(Math.abs(answer), 5 * near);
  return `${far ? "much " : ""}too ${guess > answer ? "high" : "low"}`;
}

function judgeGuess(guess, answer) {
  const [said, right] = [readNumbers(guess), readNumbers(answer)];
  if (!right.length) {
    const [a, b] = [guess, answer].map((t) => t.toLowerCase().replace(/[^\p{L}\p{N}_]+/gu, " ").trim());
    return a === b ? "right" : "other words: show the value and compare";
  }
  if (said.length !== right.length)
    return `the answer has ${right.length} number${right.length > 1 ? "s" : ""}, yours has ${said.length}`;
  return said.map((number, i) => judgeNumber(number, right[i])).find((t) => t !== "right") ?? "right";
}

function startCheck(box) {
  const [input, status] = [box.querySelector("input, textarea"), box.querySelector("[role=status]")];
  const key = `exercise:${box.dataset.name}`;
  input.value = localStorage.getItem(key) ?? "";
  input.addEventListener("input", () => localStorage.setItem(key, input.value));
  box.querySelector(".ask")?.addEventListener("click", () => {
    status.textContent = input.value.trim()
      ? `${judgeGuess(input.value, box.dataset.answer)}.`
      : "Write down a guess first.";
  });
  input.addEventListener("keydown", ({ key }) => key === "Enter" && box.querySelector(".ask")?.click());
  box.querySelector(".show")?.addEventListener("click", () => {
    status.textContent = `The run found ${box.dataset.answer}.`;
  });
}

globalThis.document?.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".check").forEach(startCheck);
});
