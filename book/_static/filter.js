// The page "Paper and here": show the rows that contain every word typed.
document.addEventListener("DOMContentLoaded", () => {
  const input = document.getElementById("filter");
  if (!input) return;
  const rows = [...document.querySelectorAll("#filtered tbody:not(.head) tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      count += !row.hidden;
    });
    document.getElementById("filter-count").textContent = `${count} of ${rows.length} rows`;
  };
  input.addEventListener("input", show);
  show();
});
