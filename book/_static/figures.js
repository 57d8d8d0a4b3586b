// A click on a figure shows it as large as the window, another one larger; Close, or Escape, goes back. Without scripts the link opens the picture.
document.addEventListener("DOMContentLoaded", () => {
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  dialog.setAttribute("aria-label", "Enlarged figure");
  dialog.addEventListener("click", ({ target }) => (target.tagName === "IMG" ? target.classList.toggle("large") : dialog.close()));
  document.body.append(dialog);
  for (const link of document.querySelectorAll("a.enlarge")) {
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      const image = new Image();
      image.src = link.href;
      image.alt = link.querySelector("img").alt;
      const close = document.createElement("button");
      close.textContent = "Close";
      dialog.replaceChildren(close, image);
      dialog.showModal();
    });
  }
});
