// Links what is compared: pointing at a piece lights up its partner and says what both are.
for (const streams of document.querySelectorAll("[data-streams]")) {
  const readout = streams.querySelector("[data-readout]");
  const idle = readout.textContent;
  const linked = new Map();
  for (const piece of streams.querySelectorAll("[data-group]")) {
    const group = piece.dataset.group;
    linked.set(group, [...(linked.get(group) ?? []), piece]);
  }
  let kept = null;

  const light = (group) => {
    for (const piece of streams.querySelectorAll(".lit")) piece.classList.remove("lit");
    streams.classList.toggle("lighting", group !== null);
    const pieces = linked.get(group) ?? [];
    for (const piece of pieces) piece.classList.add("lit");
    readout.textContent = pieces.length
      ? pieces.map((piece) => `${piece.dataset.role}: ${piece.dataset.note}`).join("   ↔   ")
      : idle;
  };
  const groupOf = (event) => event.target.closest?.("[data-group]")?.dataset.group ?? null;

  streams.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse") light(groupOf(event) ?? kept);
  });
  streams.addEventListener("pointerleave", () => light(kept));
  streams.addEventListener("click", (event) => {
    const group = groupOf(event);
    if (group === null && event.target.closest("details")) return;
    kept = group === kept ? null : group;
    light(kept);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") light((kept = null));
  });
}
