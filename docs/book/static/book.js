// "Open every fold": before printing, say. Pressed again, it closes them.
addEventListener("DOMContentLoaded", () => {
  for (const button of document.querySelectorAll("button.unfold")) {
    button.addEventListener("click", () => {
      const folds = [...document.querySelectorAll("article details")];
      const open = folds.some((fold) => !fold.open);
      folds.forEach((fold) => (fold.open = open));
      button.textContent = open ? "Close every fold" : "Open every fold";
    });
  }
});
