(function () {
  const figures = data();
  const width = document.documentElement.clientWidth;
  const narrow = width < 700;

  // a legend beside the plot leaves a phone no plot
  function fit(layout) {
    delete layout.width;
    layout.autosize = true;
    if (!narrow) return;
    const title = layout.title;
    if (title && title.text && !title.text.includes("<")) {
      title.text = fold(title.text, Math.floor((width - 30) / 8));
      title.font = Object.assign({}, title.font, { size: 14 });
    }
    layout.margin = Object.assign({}, layout.margin, { l: 50, r: 10 });
    layout.legend = Object.assign({}, layout.legend, {
      orientation: "h", x: 0, xanchor: "left", y: -0.22, yanchor: "top",
    });
    layout.height = (layout.height || 420) + 60;
  }
  for (const [id, figure] of Object.entries(figures)) {
    const layout = figure.layout || {};
    fit(layout);
    Plotly.newPlot(id, {
      data: figure.data, layout: layout, frames: figure.frames || [],
      config: { responsive: true, displaylogo: false, scrollZoom: false },
    });
  }
})();
