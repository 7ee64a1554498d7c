// The buttons of sphinx-copybutton have a tooltip and no name for readers of the screen.
addEventListener("load", () => {
  for (const button of document.querySelectorAll("button.copybtn")) button.setAttribute("aria-label", "Copy this code");
});
