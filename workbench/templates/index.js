(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  for (const [id, figure] of Object.entries(figures)) {
    Plotly.newPlot(id, { data: figure.data, layout: figure.layout, config: { staticPlot: true } });
  }
})();
