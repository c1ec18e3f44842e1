(function () {
  const { notebooks, reports } = data();
  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "cross", "star"];
  const PANELS = 12; // drawn at once
  const NAME = "report"; // stands for the report itself where one of the parameters could
  const [VALUE, LO, HI, FLOOR_LO, FLOOR_HI] = [0, 1, 2, 3, 4]; // places in a row's numbers
  const byId = (id) => document.getElementById(id);
  const narrow = document.documentElement.clientWidth < 700;

  // figures.js of a report calls this; it is loaded once, when it is first looked at
  const loaded = new Map();
  window.workbenchFigures = (script, figures) => script.received(figures);
  function figuresOf(report) {
    if (!loaded.has(report.name)) {
      loaded.set(report.name, new Promise((settle) => {
        if (!report.script) return settle({});
        const script = document.createElement("script");
        script.received = settle;
        script.onerror = () => settle({});
        script.onload = () => settle({}); // one that was cut short calls nothing
        script.src = report.script;
        document.head.append(script);
      }));
    }
    return loaded.get(report.name);
  }

  function valueOf(report, name) {
    if (name === NAME) return report.name;
    return name in report.values ? report.values[name] : "";
  }
  function compare(one, two) {
    const numbers = [Number(one), Number(two)];
    if (one !== "" && two !== "" && numbers.every(Number.isFinite)) return numbers[0] - numbers[1];
    return one.localeCompare(two, undefined, { numeric: true });
  }
  const distinct = (values) => [...new Set(values)];
  function element(kind, parts, settings) {
    const made = Object.assign(document.createElement(kind), settings || {});
    made.append(...parts);
    return made;
  }
  function fill(select, options, chosen) {
    select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    if (options.some(([value]) => value === chosen)) select.value = chosen;
  }

  const asked = new URLSearchParams(location.hash.slice(1));
  let limit = PANELS;

  function remember() {
    const state = new URLSearchParams();
    for (const select of document.querySelectorAll("select")) {
      if (select.value || select.name) state.set(select.name || select.id, select.value);
    }
    history.replaceState(null, "", "#" + state.toString());
  }

  // notebook, then the parameter, then what the others are held at
  function chooseNotebook() {
    const varying = notebooks[byId("notebook").value].varying;
    fill(byId("over"), [...varying, NAME].map((name) => [name, name]), asked.get("over"));
    chooseOver();
  }
  function chooseOver() {
    const { varying } = notebooks[byId("notebook").value];
    const mine = reports.filter((report) => report.notebook === byId("notebook").value);
    const over = byId("over").value;
    const held = over === NAME ? [] : varying.filter((name) => name !== over);
    byId("fixed").replaceChildren(...held.map((name) => {
      const select = element("select", [], { name: "at:" + name });
      const values = distinct(mine.map((report) => valueOf(report, name))).sort(compare);
      // few reports are best seen all at once
      const first = mine.length <= PANELS ? "" : "=" + values[0];
      fill(select, [["", "all"], ...values.map((value) => ["=" + value, value || "(none)"])],
        asked.has("at:" + name) ? asked.get("at:" + name) : first);
      if (!asked.has("at:" + name)) select.value = first;
      return element("label", [name + " ", select]);
    }));
    update();
  }
  function selection() {
    const over = byId("over").value;
    const fixed = [...byId("fixed").querySelectorAll("select")]
      .map((select) => [select.name.slice(3), select.value]);
    const free = fixed.filter(([, value]) => !value).map(([name]) => name);
    const kept = reports.filter((report) => report.notebook === byId("notebook").value &&
      fixed.every(([name, value]) => !value || "=" + valueOf(report, name) === value));
    const places = [over, ...free];
    kept.sort((one, two) => {
      for (const name of places) {
        const sign = compare(valueOf(one, name), valueOf(two, name));
        if (sign) return sign;
      }
      return compare(one.name, two.name);
    });
    return { over, free, kept };
  }
  function update() {
    limit = PANELS;
    const { kept } = selection();
    byId("title").textContent = notebooks[byId("notebook").value].title;
    const lost = kept.filter((report) => report.status !== "ok").length;
    byId("count").textContent = `${kept.length.toLocaleString("en")} report` +
      `${kept.length === 1 ? "" : "s"}${lost ? `, ${lost} of them without numbers` : ""}`;
    const labels = distinct(kept.flatMap((report) => report.key.map((row) => row.label)));
    fill(byId("label"), labels.map((label) => [label, label]),
      byId("label").value || asked.get("label"));
    drawNumbers();
    drawPanels();
  }

  function drawNumbers() {
    remember();
    const { over, free, kept } = selection();
    const label = byId("label").value;
    const points = kept.flatMap((report) => report.key
      .filter((row) => row.label === label && row.numbers[VALUE] !== null)
      .map((row) => ({
        report, row, x: valueOf(report, over),
        series: free.map((name) => `${name} = ${valueOf(report, name)}`).join(", "),
      })));
    byId("numbers").hidden = !label;
    if (!label) return;
    const ticks = distinct(kept.map((report) => valueOf(report, over)));
    const numeric = over !== NAME && ticks.every((tick) => tick !== "" && Number.isFinite(Number(tick)));
    const far = numeric && ticks.length > 2 && Number(ticks[0]) > 0 &&
      Number(ticks[ticks.length - 1]) / Number(ticks[0]) >= 30;
    const position = (x) => !numeric ? ticks.indexOf(x) : far ? Math.log10(Number(x)) : Number(x);
    const positions = ticks.map(position);
    const span = positions[positions.length - 1] - positions[0] || 1;
    const names = distinct(points.map((point) => point.series)).sort(compare);
    // points of several series at one place would hide each other
    const step = Math.min(0.012 * span, (numeric ? 0.3 * span : 0.5) / Math.max(1, names.length));
    const place = (point) =>
      position(point.x) + (names.indexOf(point.series) - (names.length - 1) / 2) * step;
    const bars = (part, low, high) => ({
      type: "data", symmetric: false,
      array: part.map(({ row: { numbers: n } }) => n[high] === null ? 0 : n[high] - n[VALUE]),
      arrayminus: part.map(({ row: { numbers: n } }) => n[low] === null ? 0 : n[VALUE] - n[low]),
    });
    const floored = points.filter(({ row: { numbers: n } }) =>
      typeof n[FLOOR_LO] === "number" && typeof n[FLOOR_HI] === "number");
    const traces = floored.length === 0 ? [] : [{
      type: "scatter", mode: "lines", name: "without memory", hoverinfo: "skip",
      line: { color: "#c4c9cf", width: 9 },
      x: floored.flatMap((point) => [place(point), place(point), null]),
      y: floored.flatMap(({ row: { numbers: n } }) => [n[FLOOR_LO], n[FLOOR_HI], null]),
    }];
    names.forEach((name, index) => {
      const part = points.filter((point) => point.series === name);
      traces.push({
        type: "scatter", mode: "markers", name: name || label, x: part.map(place),
        y: part.map((point) => point.row.numbers[VALUE]), error_y: bars(part, LO, HI),
        marker: {
          size: 9, color: COLOURS[index % COLOURS.length], symbol: SYMBOLS[index % SYMBOLS.length],
        },
        text: part.map(({ report, row }) => plain(
          `${report.name}: ${row.value}${row.interval ? ` (${row.interval})` : ""}, n = ${row.n}`)),
        hovertemplate: "%{text}<extra></extra>",
      });
    });
    for (const trace of traces) trace.name = plain(trace.name);
    const unit = points.length ? points[0].row.unit : "";
    const most = narrow ? 4 : 14; // tick labels that find room
    const every = numeric ? 1 : Math.ceil(ticks.length / most);
    const short = (tick) => plain(tick.length > 24 ? "…" + tick.slice(-23) : tick);
    Plotly.react("dots", traces, {
      template: "none", height: 360, autosize: true, hovermode: "closest",
      margin: { l: 70, r: 15, t: 10, b: 70 }, font: { family: "system-ui, sans-serif", size: 13 },
      xaxis: {
        title: { text: plain(over) }, zeroline: false, gridcolor: "#eef0f3",
        ...(numeric && ticks.length > most ? { tickmode: "auto", nticks: most } : {
          tickmode: "array",
          tickvals: positions.filter((_, at) => at % every === 0),
          ticktext: ticks.filter((_, at) => at % every === 0).map(short),
        }),
        range: numeric
          ? [positions[0] - 0.08 * span, positions[positions.length - 1] + 0.08 * span]
          : [-0.5, ticks.length - 0.5],
      },
      yaxis: {
        title: { text: fold(plain(label + (unit ? ` [${unit}]` : "")), 38) },
        zeroline: false, gridcolor: "#e4e7eb",
      },
      showlegend: names.length > 1 || floored.length > 0,
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
    }, { displaylogo: false, responsive: true, displayModeBar: false });
    byId("dots-note").textContent =
      "A dot is one report's number, its line the 95 % interval" +
      (floored.length ? "; the grey bar is what texts without memory give." : ".") +
      (far ? " The axis is logarithmic." : "");
    drawTable(over, free, kept);
  }
  // plotly reads a little markup in texts; a value that looks like markup is shown as it is
  function plain(text) {
    return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }
  function written(text) {
    return text.replace(/<br>/g, " ").replace(/&lt;/g, "<").replace(/&gt;/g, ">")
      .replace(/&amp;/g, "&");
  }

  function drawTable(over, free, kept) {
    const labels = distinct(kept.flatMap((report) => report.key.map((row) => row.label)));
    const names = [over, ...free].filter((name) => name !== NAME);
    const head = ["report", ...names, "status", ...labels].map((name) =>
      element("th", [name], { scope: "col" }));
    const body = kept.map((report) => {
      const link = report.link ? element("a", [report.name], { href: report.link }) : report.name;
      const parts = [element("td", [link], { className: "name" })];
      if (report.error) parts[0].append(element("span", [cut(report.error)], { className: "error" }));
      for (const name of names) {
        const cell = element("td", [valueOf(report, name)], { className: "given" });
        parts.push(labelled(name, cell));
      }
      parts.push(labelled("status", element("td", [
        element("span", [report.status], { className: "status " + report.status })])));
      for (const label of labels) {
        const row = report.key.find((each) => each.label === label);
        if (!row) { parts.push(element("td", [])); continue; }
        const cell = element("td", [element("b", [row.value]), row.unit ? " " + row.unit : ""], {
          className: label === byId("label").value ? "number" : "number other", title: row.reason,
        });
        if (row.interval) cell.append(element("span", [row.interval], { className: "interval" }));
        parts.push(labelled(label, cell));
      }
      return element("tr", parts);
    });
    byId("key").replaceChildren(element("thead", [element("tr", head)]), element("tbody", body));
  }
  function labelled(name, cell) {
    cell.dataset.label = name;
    return cell;
  }
  const cut = (text) => text.length > 160 ? text.slice(0, 159) + "…" : text;

  const titleOf = (figure, nth) => {
    const title = figure.layout && figure.layout.title;
    const text = typeof title === "string" ? title : (title && title.text) || "";
    return `${nth}. ${written(text) || "without a title"}`;
  };

  let drawing = 0; // a later choice overtakes one whose figures are still coming
  async function drawPanels() {
    remember();
    const mine = ++drawing;
    const { over, free, kept } = selection();
    const seen = kept.slice(0, limit);
    const found = await Promise.all(seen.map(figuresOf));
    if (mine !== drawing) return;
    const titles = new Map();
    for (const figures of found) {
      for (const [id, figure] of Object.entries(figures)) {
        if (!titles.has(id)) titles.set(id, titleOf(figure, titles.size + 1));
      }
    }
    fill(byId("figure"), [...titles], byId("figure").value || asked.get("figure"));
    remember();
    const chosen = byId("figure").value;
    byId("figures").hidden = titles.size === 0;
    const wide = found.some((figures) => figures[chosen] && axesAcross(figures[chosen]) > 1);
    byId("panels").className = wide ? "wide" : "";
    for (const old of byId("panels").querySelectorAll(".js-plotly-plot")) Plotly.purge(old);

    const drawn = [];
    byId("panels").replaceChildren(...seen.map((report, at) => {
      const words = over === NAME ? report.name
        : [over, ...free].map((name) => `${name} = ${valueOf(report, name)}`).join(", ");
      const head = report.link ? element("a", [words], { href: report.link }) : words;
      const panel = element("div", [], { className: "panel" });
      const figure = found[at][chosen];
      if (figure) drawn.push([panel, figure]);
      else {
        panel.classList.add("none");
        panel.append(report.error ? `${report.status}: ${cut(report.error)}`
          : report.status === "ok" ? "This figure is not in this report." : report.status);
      }
      return element("figure", [element("figcaption", [head]), panel]);
    }));
    const plots = await Promise.all(drawn.map(([panel, figure]) =>
      Plotly.newPlot(panel, small(structuredClone(figure)))));
    if (mine !== drawing) return;
    if (byId("same").checked) await Promise.all(shareAxes(plots));
    if (mine !== drawing) return;
    drawLegend(plots);
    byId("more").hidden = kept.length <= limit;
    byId("more").textContent = `Show ${Math.min(PANELS, kept.length - limit)} more of ${kept.length}`;
  }
  function axesAcross(figure) {
    const starts = Object.entries(figure.layout || {}).filter(([name]) => /^xaxis\d*$/.test(name))
      .map(([, axis]) => (axis.domain ? axis.domain[0] : 0));
    return new Set(starts).size;
  }
  function small(figure) {
    const layout = figure.layout || {};
    const columns = Math.floor(36 / (narrow ? axesAcross(figure) || 1 : 1));
    for (const name of ["width", "title", "updatemenus", "sliders"]) delete layout[name];
    for (const [name, axis] of Object.entries(layout)) {
      if (!/^[xy]axis\d*$/.test(name) || !axis.title || !axis.title.text) continue;
      axis.title.text = fold(axis.title.text, name.startsWith("x") ? columns : 36);
      axis.title.font = Object.assign({}, axis.title.font, { size: 11 });
    }
    for (const note of layout.annotations || []) note.font = Object.assign({}, note.font, { size: 10 });
    Object.assign(layout, {
      autosize: true, showlegend: false, font: Object.assign({}, layout.font, { size: 10 }),
      height: Math.max(250, Math.min(460, 0.68 * (layout.height || 420))),
      margin: { l: 55, r: 8, t: (layout.annotations || []).length ? 26 : 8, b: 44 },
    });
    return {
      data: figure.data, layout,
      config: { displayModeBar: false, displaylogo: false, responsive: true, scrollZoom: false },
    };
  }

  // one range for each axis and colour scale over all panels
  function shareAxes(plots) {
    const changes = plots.map(() => ({}));
    const names = distinct(plots.flatMap((plot) => Object.keys(plot._fullLayout)))
      .filter((name) => /^([xy]axis|coloraxis)\d*$/.test(name));
    for (const name of names) {
      const axes = plots.map((plot) => plot._fullLayout[name]);
      const there = axes.filter(Boolean);
      if (name.startsWith("coloraxis")) {
        const ends = { [name + ".cmin"]: Math.min(...there.map((axis) => axis.cmin)),
          [name + ".cmax"]: Math.max(...there.map((axis) => axis.cmax)) };
        axes.forEach((axis, at) => axis && Object.assign(changes[at], ends));
        continue;
      }
      if (distinct(there.map((axis) => axis.type)).length > 1) continue;
      const backwards = there.every((axis) => axis.r2l(axis.range[0]) > axis.r2l(axis.range[1]));
      let range;
      if (there[0].type === "category") {
        const places = distinct(there.flatMap((axis) => axis._categories));
        axes.forEach((axis, at) => axis && Object.assign(changes[at], {
          [name + ".categoryorder"]: "array", [name + ".categoryarray"]: places,
        }));
        range = [-0.5, places.length - 0.5];
      } else {
        const ends = there.flatMap((axis) => axis.range.map((end) => axis.r2l(end)));
        range = [Math.min(...ends), Math.max(...ends)].map((end) => there[0].l2r(end));
      }
      if (backwards) range.reverse();
      axes.forEach((axis, at) => { if (axis) changes[at][name + ".range"] = [...range]; });
    }
    const depth = Math.max(0, ...plots.map((plot) => plot._fullData.length));
    const colours = plots.map(() => []);
    for (let nth = 0; nth < depth; nth += 1) {
      const scaled = plots.map((plot) => plot._fullData[nth])
        .filter((trace) => trace && typeof trace.zmin === "number");
      if (!scaled.length) continue;
      const ends = { zmin: Math.min(...scaled.map((trace) => trace.zmin)),
        zmax: Math.max(...scaled.map((trace) => trace.zmax)) };
      plots.forEach((plot, at) => {
        if (scaled.includes(plot._fullData[nth])) colours[at].push([nth, ends]);
      });
    }
    return plots.map(async (plot, at) => {
      for (const [nth, ends] of colours[at]) await Plotly.restyle(plot, ends, [nth]);
      await Plotly.relayout(plot, changes[at]);
    });
  }
  function drawLegend(plots) {
    const entries = new Map();
    for (const trace of plots.flatMap((plot) => plot._fullData)) {
      if (trace.showlegend === false || !trace.name || trace.visible !== true) continue;
      const colour = (trace.line && trace.line.color) || (trace.marker && trace.marker.color);
      if (typeof colour !== "string" || /^trace \d+$/.test(trace.name)) continue;
      entries.set(trace.name + colour, [trace.name, colour]);
    }
    byId("legend").replaceChildren(...[...entries.values()].map(([name, colour]) => {
      const swatch = element("i", []);
      swatch.style.background = colour;
      return element("span", [swatch, written(name)]);
    }));
  }

  for (const form of document.querySelectorAll("form")) {
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  const forget = () => { for (const name of [...asked.keys()]) asked.delete(name); };
  byId("notebook").addEventListener("change", () => { forget(); chooseNotebook(); });
  byId("over").addEventListener("change", () => { forget(); chooseOver(); });
  byId("fixed").addEventListener("change", update);
  byId("label").addEventListener("change", drawNumbers);
  byId("figure").addEventListener("change", drawPanels);
  byId("same").addEventListener("change", drawPanels);
  byId("more").addEventListener("click", () => { limit += PANELS; drawPanels(); });
  fill(byId("notebook"), Object.entries(notebooks).map(([name, { title }]) => [name, name]),
    asked.get("notebook"));
  chooseNotebook();
})();
