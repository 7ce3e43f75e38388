// Tables of many rows: a head sorts by its column (the better end first, then the other, then as
// given), and a word above them picks rows. Short ones stay as they are.
const MANY = 20;
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const given = [...body.rows];
  if (given.length <= MANY) continue;
  const heads = [...table.tHead.rows[0].cells];

  const key = (row, column) => {
    const cell = row.cells[column];
    return column === 0 ? cell.textContent.trim() : Number(cell.dataset.sort ?? NaN);
  };
  const sort = (column, direction) => {
    const missing = (x) => (Number.isNaN(x) ? 1 : 0);
    const order = direction === 0 ? given : [...given].sort((a, b) => {
      const x = key(a, column), y = key(b, column);
      if (column === 0) return direction * x.localeCompare(y, undefined, { numeric: true });
      return missing(x) - missing(y) || direction * (x - y) || 0;
    });
    body.append(...order);
  };

  heads.forEach((head, column) => {
    const first = column === 0 || head.dataset.better === "lower" ? 1 : -1;
    const cycle = [first, -first, 0];
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...(column === 0 ? ["name"] : head.childNodes));
    head.replaceChildren(button);
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

  const bar = document.createElement("p");
  const label = document.createElement("label");
  const word = document.createElement("input");
  const count = document.createElement("output");
  bar.className = "filter";
  word.type = "search";
  label.append("Rows with ", word);
  bar.append(label, count);
  const pick = () => {
    const wanted = word.value.trim().toLowerCase();
    for (const row of given) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    count.textContent = `${given.filter((row) => !row.hidden).length} of ${given.length} rows`;
  };
  word.addEventListener("input", pick);
  pick();
  table.parentElement.before(bar);
}
