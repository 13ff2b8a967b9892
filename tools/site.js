// On a telephone the sidebar opens at its top, whatever it was scrolled to; the section of the page is still open in it.
(() => {
  const sidebar = document.querySelector("#quarto-sidebar");
  if (!sidebar) return;
  document.querySelectorAll(".quarto-btn-toggle").forEach((o) => o.addEventListener("click", () => { sidebar.scrollTop = 0; }));
})();
