// Lets a click on a column's head sort the rows: the better end first, then the other, then as given.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const given = [...body.rows];
  if (given.length < 3) continue;
  const heads = [...table.tHead.rows[0].cells];

  const key = (row, column) => {
    const text = row.cells[column].dataset.sort;
    return text === undefined ? NaN : Number(text);
  };
  const sort = (column, direction) => {
    const missing = (x) => (Number.isNaN(x) ? 1 : 0);
    const order = direction === 0 ? given : [...given].sort((a, b) => {
      const x = key(a, column), y = key(b, column);
      return missing(x) - missing(y) || direction * (x - y) || 0;
    });
    body.append(...order);
  };

  heads.forEach((head, column) => {
    if (column === 0) return;
    const first = "lower" === head.dataset.better ? 1 : -1;
    const cycle = [first, -first, 0];
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    let clicks = 0;
    button.addEventListener("click", () => {
      const active = head.hasAttribute("aria-sort");
      clicks = active ? (clicks + 1) % 3 : 0;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      const direction = cycle[clicks];
      if (direction) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      sort(column, direction);
    });
  });
}
