(function () {
  if (document.getElementById("data")) {
    for (const [id, figure] of Object.entries(data())) {
      Plotly.newPlot(id, {
        data: figure.data, layout: figure.layout, config: { staticPlot: true },
      });
    }
  }
  const form = document.getElementById("filters");
  if (!form) return;

  const MOST_KEY_COLUMNS = 8; // of several notebooks at once; more would be a wall of blanks
  const MOST_CHOICES = 200; // a longer list nobody reads: the search finds such values
  const heads = [...document.querySelectorAll("table.reports th")];
  const body = document.querySelector("table.reports tbody");
  const rows = [...body.rows].map((element, place) => ({
    element, place,
    values: [...element.cells].map((cell) => cell.dataset.value || ""),
    text: element.textContent.toLowerCase(),
  }));
  const words = document.getElementById("words");
  const order = document.getElementById("order");
  const descending = document.getElementById("descending");
  const choices = [...form.querySelectorAll("select[data-column]")];
  const notebook = heads.findIndex((head) => head.classList.contains("notebook"));

  function compare(one, two) {
    const numbers = [Number(one), Number(two)];
    if (numbers.every(Number.isFinite)) return numbers[0] - numbers[1];
    return one.localeCompare(two, undefined, { numeric: true });
  }
  for (const choice of choices) {
    const column = Number(choice.dataset.column);
    const found = [...new Set(rows.map((row) => row.values[column]))].filter((value) => value !== "");
    if (found.length > MOST_CHOICES) choice.parentElement.hidden = true;
    else for (const value of found.sort(compare)) choice.append(new Option(value, value));
  }

  function show() {
    const asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = choices.filter((choice) => choice.value !== "");
    const kept = rows.filter((row) =>
      chosen.every((choice) => row.values[Number(choice.dataset.column)] === choice.value) &&
      asked.every((word) => row.text.includes(word)));
    const column = Number(order.value);
    const sign = descending.checked ? -1 : 1;
    kept.sort((one, two) => {
      const [a, b] = [one.values[column], two.values[column]];
      // what has no value stands last, whichever way
      if (a === "" || b === "") return (a === "") - (b === "") || one.place - two.place;
      return sign * compare(a, b) || one.place - two.place;
    });
    body.replaceChildren(...kept.map((row) => row.element));

    const notebooks = new Set(kept.map((row) => (notebook < 0 ? "" : row.values[notebook])));
    const filled = heads.map((head, at) =>
      kept.some((row) => row.element.cells[at].textContent !== ""));
    const keys = heads.filter((head, at) => head.classList.contains("key") && filled[at]).length;
    const folded = notebooks.size > 1 && keys > MOST_KEY_COLUMNS;
    const hidden = heads.map((head, at) => kept.length > 0 &&
      (head.classList.contains("key") || head.classList.contains("parameter")) &&
      (!filled[at] || (folded && head.classList.contains("key"))));
    heads.forEach((head, at) => { head.hidden = hidden[at]; });
    for (const row of kept) {
      [...row.element.cells].forEach((cell, at) => { cell.hidden = hidden[at]; });
    }
    heads.forEach((head, at) => head.setAttribute("aria-sort",
      at !== column ? "none" : descending.checked ? "descending" : "ascending"));
    document.getElementById("hint").hidden = !folded;
    document.getElementById("count").textContent = kept.length === rows.length
      ? `${rows.length.toLocaleString("en")} reports`
      : `${kept.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} reports`;
    const link = document.getElementById("compare");
    if (link && notebooks.size === 1 && notebook >= 0) {
      link.hash = new URLSearchParams({ notebook: [...notebooks][0] }).toString();
    }
  }

  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(show)); // after the fields are empty
  for (const button of document.querySelectorAll("table.reports th button")) {
    button.addEventListener("click", () => {
      descending.checked = order.value === button.dataset.column && !descending.checked;
      order.value = button.dataset.column;
      show();
    });
  }
  show();
})();
