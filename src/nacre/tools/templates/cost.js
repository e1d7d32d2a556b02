"use strict";
(() => {
  const bill = JSON.parse(document.getElementById("data").textContent);
  const config = { displaylogo: false, responsive: true, displayModeBar: false };
  const paper = { "--text": "#1c2430", "--back": "#ffffff", "--line": "#8885", "--accent": "#2563a8", "--bad": "#c0392b" };
  const paperWidth = 640; // pixels, of a sheet between its margins
  let printing = false;
  const color = (name) => printing ? paper[name] : getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const layout = (more) => ({
    width: printing ? paperWidth : undefined,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: color("--text"), size: 13 },
    margin: { t: 10, r: 10, b: 50, l: 70 }, ...more,
  });

  function parts() {
    const measure = document.getElementById("measure").value;
    Plotly.react("parts", [{
      type: document.getElementById("form").value,
      ids: bill.rows.map((row, place) => String(place)),
      parents: bill.rows.map((row) => (row.parent === null ? "" : String(row.parent))),
      labels: bill.rows.map((row) => row.label),
      values: bill.rows.map((row) => row.own[measure]),
      text: bill.rows.map((row) => row.text[measure]),
      customdata: bill.rows.map((row) => [row.name || "(model)", row.kind]),
      hovertemplate: "%{customdata[0]}<br>%{customdata[1]}<br>%{text}<extra></extra>",
      branchvalues: "remainder", textinfo: "label+text", marker: { line: { color: color("--back"), width: 1 } },
      tiling: document.getElementById("form").value === "icicle" ? { orientation: "v" } : { pad: 2 },
    }], layout({ margin: { t: 28, r: 4, b: 4, l: 4 } }), config);
  }

  function roofline() {
    if (!document.getElementById("roofline")) return;
    const { matrix_flops: peak, copy_bytes: bandwidth } = bill.ceilings;
    const points = bill.rows.filter((row) => row.speed > 0);
    const all = points.map((row) => row.intensity).concat(peak / bandwidth);
    const left = Math.min(...all) / 3, right = Math.max(...all) * 3, ridge = peak / bandwidth;
    Plotly.react("roofline", [
      { type: "scatter", mode: "lines", x: [left, ridge, right], y: [left * bandwidth, peak, peak], name: "limit",
        line: { color: color("--accent") }, hoverinfo: "skip" },
      { type: "scatter", mode: "markers", x: points.map((row) => row.intensity), y: points.map((row) => row.speed),
        text: points.map((row) => row.name || "(model)"), customdata: points.map((row) => row.kind), name: "calls",
        marker: { color: color("--bad"), size: 9, opacity: 0.7 },
        hovertemplate: "%{text}<br>%{customdata}<br>%{x:.3s} FLOPs a byte<br>%{y:.3s} FLOP/s<extra></extra>" },
    ], layout({
      showlegend: false,
      xaxis: { type: "log", title: { text: "FLOPs for each byte" }, gridcolor: color("--line"), exponentformat: "SI" },
      yaxis: { type: "log", title: { text: "FLOP/s" }, gridcolor: color("--line"), exponentformat: "SI" },
    }), config);
  }

  const draw = () => { parts(); roofline(); };
  const print = (on) => () => { printing = on; draw(); };
  addEventListener("beforeprint", print(true));
  addEventListener("afterprint", print(false));
  document.getElementById("measure").addEventListener("change", parts);
  document.getElementById("form").addEventListener("change", parts);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();

  const body = document.querySelector("#rows tbody");
  const rows = [...body.rows];
  const children = new Map();
  for (const row of rows) {
    if (!children.has(row.dataset.parent)) children.set(row.dataset.parent, []);
    children.get(row.dataset.parent).push(row);
  }
  const button = (row) => row.cells[0].querySelector("button");
  const within = (row) => children.get(row.dataset.row) || [];

  function show(row, visible) {
    row.hidden = !visible;
    const open = !button(row) || button(row).getAttribute("aria-expanded") === "true";
    for (const child of within(row)) show(child, visible && open);
  }
  function fold(row, open) {
    if (!button(row)) return;
    button(row).setAttribute("aria-expanded", String(open));
    button(row).textContent = open ? "\u25be" : "\u25b8";
  }
  for (const row of rows) {
    if (button(row)) button(row).addEventListener("click", () => {
      fold(row, button(row).getAttribute("aria-expanded") !== "true");
      show(row, !row.hidden);
    });
  }
  const all = (open) => {
    for (const row of rows) fold(row, open || row.dataset.parent === "");
    for (const row of children.get("") || []) show(row, true);
  };
  document.getElementById("unfold").addEventListener("click", () => all(true));
  document.getElementById("fold").addEventListener("click", () => all(false));

  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const headings = [...document.querySelectorAll("#rows th")];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const descending = heading.getAttribute("aria-sort") !== "descending";
    for (const other of headings) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const sign = descending ? -1 : 1;
    const order = (one, other) => {
      const [first, second] = [value(one, column), value(other, column)];
      return sign * (typeof first === "number" ? first - second : first.localeCompare(second));
    };
    const place = (row) => {
      body.append(row);
      [...within(row)].sort(order).forEach(place);
    };
    (children.get("") || []).forEach(place);
  }));
  if (rows.length > 60) for (const row of rows) {
    if (Number(row.dataset.depth) >= 2) { fold(row, false); show(row, !row.hidden); }
  }
})();
