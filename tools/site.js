// The sidebar is longer than the window: beside the page it shows the entry of the page; opened on a telephone it shows its top
(() => {
  const sidebar = document.querySelector("#quarto-sidebar"), entry = sidebar && sidebar.querySelector(".sidebar-link.active");
  if (!entry || getComputedStyle(sidebar).position === "fixed") return;
  const place = entry.getBoundingClientRect(), box = sidebar.getBoundingClientRect();
  if (place.bottom > box.bottom) sidebar.scrollTop += place.top - box.top - box.height / 2;
})();
