"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector) => document.querySelector(selector);
  // A real button inside the cell: reached by keyboard, announced as one, and the cell stays a cell.
  const pressable = (cell, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "bare";
    button.append(...cell.childNodes);
    cell.append(button);
    cell.addEventListener("click", act);
    return button;
  };

  // Theme: follow the system until the reader chooses. A page opened from disk may have no storage.
  const stored = (value) => {
    try {
      if (value) localStorage.setItem("sharpscope-theme", value);
      return localStorage.getItem("sharpscope-theme");
    } catch { return value; }
  };
  const theme = one("#theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const paint = (chosen) => {
    if (chosen) document.documentElement.dataset.theme = chosen;
    const dark = (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
    theme.textContent = dark ? "Light" : "Dark";
  };
  paint(stored());
  system.addEventListener("change", () => paint());
  theme.addEventListener("click", () => paint(stored(theme.textContent.toLowerCase()) || theme.textContent.toLowerCase()));
  theme.hidden = false;

  // Sort: by number where the cells carry one (those without go last), else by text.
  const key = (row, column) => {
    const cell = row.cells[column];
    return "key" in cell.dataset ? Number(cell.dataset.key) : cell.textContent;
  };
  const numeric = (row, column) => typeof key(row, column) === "number";
  const compare = (column, sign) => (a, b) => {
    const [x, y] = [numeric(a, column), numeric(b, column)];
    if (x !== y) return x ? -1 : 1;
    return sign * (x ? key(a, column) - key(b, column) : key(a, column).localeCompare(key(b, column)));
  };
  const sort = (table, head) => {
    const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    all("thead th", table).forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare(head.cellIndex, sign)));
  };
  all("table.sortable").forEach((table) => all("thead th", table).forEach((head) => {
    head.setAttribute("aria-sort", "none");
    pressable(head, () => sort(table, head));
  }));

  // Filter the layer table: every word must occur in the row's names.
  const filter = one("#filter");
  const rows = all("#layer-table tbody tr");
  const sift = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const name = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
      row.hidden = !words.every((word) => name.includes(word));
    }
    one("#shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  filter.addEventListener("input", sift);
  sift();
  one(".controls").hidden = false;

  // Highlight one layer across figures and tables.
  const note = one("#lit");
  let lit = null;
  const light = (number, name) => {
    lit = number === lit ? null : number;
    all(".lit").forEach((element) => element.classList.remove("lit"));
    if (lit !== null) all(`[data-layer="${lit}"]`).forEach((element) => element.classList.add("lit"));
    all(".pick button").forEach((button) => button.setAttribute("aria-pressed", button.closest("tr").dataset.layer === lit));
    note.hidden = lit === null;
    if (lit !== null) note.firstElementChild.textContent = `Highlighted: ${name}`;
  };
  const names = new Map(all("tr[data-layer]").map((row) => [row.dataset.layer, row.cells[0].textContent]));
  all("tr[data-layer]").forEach((row) => {
    const head = row.cells[0];
    head.classList.add("pick");
    pressable(head, () => light(row.dataset.layer, head.textContent)).setAttribute("aria-pressed", "false");
  });
  all(".drawing [data-layer]").forEach((element) => {
    element.addEventListener("click", () => light(element.dataset.layer, names.get(element.dataset.layer) || ""));
  });
  note.querySelector("button").addEventListener("click", () => light(null));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") light(null); });
})();
