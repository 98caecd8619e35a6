"use strict";
// Draws the charts in the page's own colours, and again where the reader turns the lights off.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)").matches;

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(`--${name}`).trim();
    const inks = [0, 1, 2, 3, 4, 5, 6, 7].map((number) => of(`ink-${number}`));
    return { inks, panel: of("panel"), text: of("text"), faint: of("faint"), grid: of("grid") };
  }

  function axis(given, colour) {
    return {
      ...given,
      title: { ...given.title, standoff: 12, font: { size: 12, color: colour.faint } },
      gridcolor: colour.grid,
      linecolor: colour.grid,
      zerolinecolor: colour.grid,
      tickfont: { size: 12, color: colour.faint },
      automargin: true,
    };
  }

  // Plotly reads a few HTML tags in its texts, and cuts what is too long for the legend.
  function legible(name, width) {
    const most = Math.max(12, Math.floor((width - 70) / 7));
    const cut = name.length > most ? `${name.slice(0, most - 1)}…` : name;
    return cut.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  }

  // The legend takes its rows from the chart's height: the curves keep theirs.
  function heightFor(chart, width) {
    const longest = Math.max(...chart.data.map((trace) => trace.name.length));
    const columns = Math.max(1, Math.floor((width - 60) / (Math.min(longest * 7, width) + 50)));
    return 270 + 20 * Math.ceil(chart.data.length / columns);
  }

  function draw() {
    const colour = colours();
    for (const chart of charts) {
      const place = document.getElementById(chart.id);
      const width = place.clientWidth;
      place.style.height = `${heightFor(chart, width)}px`;
      const data = chart.data.map((trace) => {
        const ink = trace.meta.ink;
        const own = ink < 0 ? colour.faint : colour.inks[ink % colour.inks.length];
        return {
          ...trace,
          name: legible(trace.name, width),
          line: { ...trace.line, color: own },
          marker: { ...trace.marker, color: own },
          error_y: { ...trace.error_y, color: own },
        };
      });
      const layout = {
        ...chart.layout,
        xaxis: axis(chart.layout.xaxis, colour),
        yaxis: axis(chart.layout.yaxis, colour),
        paper_bgcolor: colour.panel,
        plot_bgcolor: colour.panel,
        font: { color: colour.text, family: "system-ui, sans-serif" },
        margin: { l: 10, r: 10, t: 16, b: 10 },
        showlegend: true,
        legend: {
          orientation: "h", x: 0, y: 1.04, yanchor: "bottom", font: { size: 12 },
        },
        hoverlabel: { namelength: -1 },
        hovermode: "closest",
        // A finger on a chart scrolls the page.
        dragmode: touch ? false : "zoom",
      };
      Plotly.react(place, data, layout, { responsive: true, displayModeBar: false });
    }
  }

  draw();
  dark.addEventListener("change", draw);
})();
