// A figure that is replaced whole: what is shown is what the model holds, whenever it is looked at.
const CONFIG = { displaylogo: false, responsive: false };

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

// one copy of plotly for all pictures of a page; in what order a page makes its models is open
async function load(model) {
  for (let tries = 0; ; tries += 1) {
    try {
      const name = model.get("_code").split("IPY_MODEL_").pop();
      const code = await model.widget_manager.get_model(name);
      // as a module: a page may have an AMD loader, which plotly's script would turn to
      const parts = [
        "const module = { exports: {} }, exports = module.exports, define = undefined;\n",
        code.get("source"),
        "\nexport default module.exports;",
      ];
      const url = URL.createObjectURL(new Blob(parts, { type: "text/javascript" }));
      return (await import(url)).default;
    } catch (error) {
      if (tries === 100) throw error;
      await wait(100);
    }
  }
}

export default {
  async render({ model, el }) {
    const place = document.createElement("div");
    place.className = "workbench-picture";
    place.setAttribute("role", "img");
    el.append(place);
    const loaded = (globalThis.workbenchPlotly ??= {});
    const version = model.get("_version");
    let plotly;
    try {
      plotly = await (loaded[version] ??= load(model));
    } catch (error) {
      delete loaded[version]; // or no figure that comes later would try again
      place.textContent = `The figure cannot be drawn: ${error.message}`;
      throw error;
    }
    let listening = false;
    let drawn = null; // the texts that are shown
    let data; // plotly redraws traces whose arrays are others, be they equal: one set is kept
    let work = Promise.resolve();
    const draw = () => {
      work = work.then(async () => {
        const [traces, frame] = [model.get("traces"), model.get("frame")];
        // without a width plotly would take one of its own; the observer below comes again
        if (!frame || !place.clientWidth) return;
        if (drawn && drawn[0] === traces && drawn[1] === frame) return;
        if (!drawn || drawn[0] !== traces) data = JSON.parse(traces);
        drawn = [traces, frame];
        await plotly.react(place, data, JSON.parse(frame), CONFIG);
        place.setAttribute("aria-label", place.layout.title?.text ?? "figure");
        if (!listening) place.on("plotly_click", ({ points: [point] }) =>
          model.send({ click: { x: point.x, y: point.y, trace: point.curveNumber } }));
        listening = true;
      }).catch((error) => console.error(error));
    };
    model.on("change:traces change:frame", draw);
    const watch = new ResizeObserver(() => {
      if (!drawn) draw();
      else if (place.clientWidth) plotly.Plots.resize(place);
    });
    watch.observe(place);
    draw();
    return () => {
      watch.disconnect();
      model.off("change:traces change:frame", draw);
      plotly.purge(place);
    };
  },
};
