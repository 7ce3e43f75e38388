// Filters each gallery by category and by disagreement. Without it every card is shown.
for (const gallery of document.querySelectorAll("[data-gallery]")) {
  const bar = gallery.querySelector("[data-filter]");
  const cards = [...gallery.querySelectorAll("[data-category]")];
  const choices = [...bar.querySelectorAll("[data-choice]")];
  const only = bar.querySelector("[data-only]");
  const count = bar.querySelector("[data-count]");
  let chosen = null;

  const isOn = (button) => button.getAttribute("aria-pressed") === "true";
  const press = (button, on) => button.setAttribute("aria-pressed", String(on));

  const apply = () => {
    let shown = 0;
    for (const card of cards) {
      const fits = chosen === null || card.dataset.category === chosen;
      card.hidden = !(fits && (!only || !isOn(only) || "disagree" in card.dataset));
      shown += card.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${cards.length} shown`;
  };

  for (const choice of choices) {
    choice.addEventListener("click", () => {
      chosen = "all" in choice.dataset ? null : choice.dataset.choice;
      choices.forEach((other) => press(other, other === choice));
      apply();
    });
  }
  if (only) only.addEventListener("click", () => { press(only, !isOn(only)); apply(); });
  bar.hidden = false;
  apply();
}
