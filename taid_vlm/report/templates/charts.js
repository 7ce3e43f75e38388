// Reads values off the charts: at one place of the axis that several share, in all of them at once.
// By pointer or by the arrow keys; without it every point has its tooltip.
const sharing = new Map();
for (const plot of document.querySelectorAll("[data-axis]")) {
  const svg = plot.querySelector("svg");
  const series = [...svg.querySelectorAll("[data-points]")].map((group) =>
    [...group.querySelectorAll("[data-x]")].map((point) => ({
      at: Number(point.dataset.x), left: Number(point.getAttribute("x")), mark: point,
      text: point.querySelector("title").textContent,
    }))).filter((points) => points.length);
  if (!series.length) continue;
  const frame = svg.querySelector("[data-frame]").getBBox();
  const line = document.createElementNS(svg.namespaceURI, "path");
  line.setAttribute("class", "cursor");
  svg.append(line);
  const { axis } = plot.dataset;
  sharing.set(axis, [...(sharing.get(axis) ?? []),
    { plot, svg, series, frame, line, reading: plot.nextElementSibling }]);
}

for (const charts of sharing.values()) {
  const places = [...new Set(charts.flatMap((chart) => chart.series.flat().map((p) => p.at)))]
    .sort((a, b) => a - b);
  const nearest = (points, distance) => points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  let place = places.at(-1);

  const read = (at, pointed) => {
    place = at;
    for (const { plot, svg, series, frame, line, reading } of charts) {
      const points = series.map((all) => nearest(all, (p) => Math.abs(p.at - at)));
      const { left, at: here } = nearest(points, (p) => Math.abs(p.at - at));
      const said = points.map(({ text, ...p }) =>
        p.at === here ? text.slice(0, text.lastIndexOf(" at ")) : text);
      line.setAttribute("d", pointed ? `M${left} ${frame.y}v${frame.height}` : "");
      for (const old of svg.querySelectorAll(".read")) old.classList.remove("read");
      if (pointed) for (const point of points) point.mark.classList.add("read");
      reading.textContent = `${plot.dataset.axis} ${here}: ${said.join(" \u00b7 ")}`;
      plot.setAttribute("aria-valuenow", at);
      plot.setAttribute("aria-valuetext", reading.textContent);
    }
  };

  for (const { plot, svg, series, reading } of charts) {
    plot.tabIndex = 0;
    const is = { role: "slider", "aria-label": svg.getAttribute("aria-label"), "aria-valuemin": places[0],
                 "aria-valuemax": places.at(-1) };
    for (const [name, value] of Object.entries(is)) plot.setAttribute(name, value);
    reading.hidden = false;
    const follow = (event) => {
      const box = svg.getBoundingClientRect();
      const left = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      read(nearest(series.flat(), (p) => Math.abs(p.left - left)).at, true);
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", () => read(places.at(-1), false));
    plot.addEventListener("blur", () => read(places.at(-1), false));
    plot.addEventListener("focus", () => read(place, true));
    plot.addEventListener("keydown", (event) => {
      const now = places.indexOf(place), last = places.length - 1;
      const next = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1,
                     Home: 0, End: last }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      read(places[Math.min(Math.max(next, 0), last)], true);
    });
  }
  read(place, false);
}
