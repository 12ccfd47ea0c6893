// The theme's sidebar opens a section by a summary that has only an icon: screen readers need a name.
document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll("nav summary:not([aria-label])")) {
    const link = summary.closest("li")?.querySelector("a");
    if (!summary.textContent.trim() && link) summary.setAttribute("aria-label", `Pages under ${link.textContent.trim()}`);
  }
});
