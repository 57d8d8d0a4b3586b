// A click on a figure shows it as large as the window; Escape, or another click, goes back. Without scripts the link opens the picture.
document.addEventListener("DOMContentLoaded", () => {
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  dialog.setAttribute("aria-label", "Enlarged figure");
  const image = dialog.appendChild(document.createElement("img"));
  dialog.addEventListener("click", () => dialog.close());
  document.body.append(dialog);
  for (const link of document.querySelectorAll("a.enlarge")) {
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      image.src = link.href;
      image.alt = link.querySelector("img").alt;
      dialog.showModal();
    });
  }
});
