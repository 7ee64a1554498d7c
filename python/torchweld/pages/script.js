"use strict";
document.documentElement.classList.add("js");

// Dark mode: what the system says, until the button says otherwise. A page from a file may have no storage.
{
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* the choice lasts as long as the page */ }
  const show = () => {
    const theme = chosen ?? (system.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    button.setAttribute("aria-pressed", String(theme === "dark"));
  };
  button.addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", chosen); } catch { /* see above */ }
    show();
  });
  system.addEventListener("change", show);
  show();
}

// A heading's button sorts by its column: numbers by data-v, text as people read it. What has no number stays last.
const key = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
};
const compare = (a, b, direction) => {
  if (a === "" || b === "") return (a === "") - (b === "");
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  if (typeof a === "number") return direction * (a - b);
  return direction * String(a).localeCompare(String(b), "en", { numeric: true });
};
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button")?.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(key(a, column), key(b, column), up ? 1 : -1));
      table.tBodies[0].append(...rows);
    });
  });
}

// Filters: words that a row must contain, and for some columns one of the values.
for (const form of document.querySelectorAll("form.filters")) {
  const rows = [...document.getElementById(form.dataset.table).tBodies[0].rows];
  const output = form.querySelector("output");
  const filter = () => {
    const words = form.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = [...form.querySelectorAll("select")].filter((select) => select.value);
    let shown = 0;
    for (const row of rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      const keep = words.every((word) => text.includes(word))
        && wanted.every((select) => row.cells[select.dataset.column].textContent === select.value);
      row.hidden = !keep;
      shown += keep;
    }
    output.value = `${shown} of ${rows.length} rows`;
  };
  form.addEventListener("input", filter);
  // The event "reset" comes before the fields have their first values, so the button resets, then filters.
  form.querySelector("button[type=reset]").addEventListener("click", (event) => {
    event.preventDefault();
    form.reset();
    filter();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
