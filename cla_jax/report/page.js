"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // The namespace of SVG, from a picture that is there: the page names no address.
  const svgs = document.querySelector("svg").namespaceURI;
  const make = (tag, text, parent) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const table = (parent, head, lines) => {
    const made = make("table", undefined, parent);
    const first = make("tr", undefined, made);
    head.forEach((text) => (make("th", text, first).className = "left"));
    lines.forEach((cells) => {
      const line = make("tr", undefined, made);
      cells.forEach((text) => (make("td", text, line).className = "left"));
    });
  };

  // The config of the point that was chosen.
  const shown = document.getElementById("shown");
  const show = (point) => {
    const entry = data.points[Number(point.dataset.point)];
    shown.replaceChildren();
    make("h3", entry.name, shown);
    const lines = [...Object.entries(entry.scores), ...Object.entries(entry.config)];
    table(shown, ["", ""], lines.map(([key, value]) => [key, value ?? "none"]));
  };
  document.querySelectorAll("[data-point]").forEach((point) => {
    const entry = data.points[Number(point.dataset.point)];
    const title = document.createElementNS(svgs, "title");
    title.textContent = entry.name + "\n" +
      Object.entries(entry.scores).map((pair) => pair.join(": ")).join("\n");
    point.prepend(title);
    point.addEventListener("click", () => show(point));
    point.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        show(point);
      }
    });
  });

  // Two runs: the settings that differ, and both loss curves.
  const pair = document.getElementById("pair");
  if (!pair) return;
  const chosen = ["a", "b"].map((id) => document.getElementById(id));
  const draw = (runs) => {
    const [width, height, left, bottom] = [640, 300, 56, 34];
    const all = runs.flatMap((run) => run.loss.slice(Math.floor(run.loss.length / 5)));
    const last = Math.max(...runs.flatMap((run) => run.tokens));
    if (!all.length) return;
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const room = (high - low) * 0.05 || 0.1;
    const x = (tokens) => left + (tokens / last) * (width - left - 10);
    const y = (loss) => {
      const share = (loss - low + room) / (high - low + 2 * room);
      return height - bottom - share * (height - bottom - 10);
    };
    const svg = document.createElementNS(svgs, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "Training loss of both runs over training tokens");
    const add = (tag, attributes, text) => {
      const node = document.createElementNS(svgs, tag);
      Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
      if (text !== undefined) node.textContent = text;
      svg.append(node);
    };
    for (let i = 0; i <= 4; i++) {
      const loss = low + ((high - low) * i) / 4;
      add("line", { x1: left, x2: width - 10, y1: y(loss), y2: y(loss), stroke: "var(--grid)" });
      const place = { x: left - 8, y: y(loss) + 4, "text-anchor": "end", "font-size": 12 };
      add("text", { ...place, fill: "var(--muted)" }, loss.toFixed(3));
    }
    const below = { x: width - 10, y: height - 10, "text-anchor": "end", "font-size": 12 };
    add("text", { ...below, fill: "var(--muted)" },
      `training loss over ${last.toLocaleString("en")} training tokens`);
    const colours = ["#2f6fde", "#e8710a"];
    runs.forEach((run, i) => {
      const first = run.loss.findIndex((loss) => y(loss) > 0);
      const line = run.loss.slice(first).map((loss, k) => `${x(run.tokens[first + k])},${y(loss)}`);
      const look = { fill: "none", stroke: colours[i], "stroke-width": 2 };
      add("polyline", { points: line.join(" "), ...look });
      add("text", { x: left + 12, y: 22 + 18 * i, "font-size": 13, fill: colours[i] }, run.name);
    });
    pair.append(svg);
  };
  const compare = () => {
    const runs = chosen.map((choice) => data.runs[Number(choice.value)]);
    const keys = new Set(runs.flatMap((run) => Object.keys(run.config)));
    const apart = [...keys].filter((key) => runs[0].config[key] !== runs[1].config[key]);
    const scores = new Set(runs.flatMap((run) => Object.keys(run.scores)));
    pair.replaceChildren();
    const cells = (key, kind) => [key, ...runs.map((run) => run[kind][key] ?? "none")];
    table(pair, ["", ...runs.map((run) => run.name)], [
      ...[...scores].map((key) => cells(key, "scores")),
      ...apart.map((key) => cells(key, "config")),
    ]);
    if (!apart.length) make("p", "The configs are equal.", pair);
    draw(runs);
  };
  chosen.forEach((choice) => choice.addEventListener("change", compare));
  compare();
})();
