"use strict";
const values = JSON.parse(document.getElementById("values").textContent);
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - width - 8)) + "px";
  tip.style.top = (y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18) + "px";
}
const hideTip = () => { tip.hidden = true; };

// -- words of the glossary --
for (const term of document.querySelectorAll(".term")) {
  const show = () => {
    const box = term.getBoundingClientRect();
    showTip(term.dataset.meaning, box.left - 14, box.bottom - 12);
  };
  term.addEventListener("pointerenter", show);
  term.addEventListener("focus", show);
  term.addEventListener("pointerleave", hideTip);
  term.addEventListener("blur", hideTip);
}

// -- values under the pointer --
function cellAt(axes, x, y) {
  const [left, top, right, bottom] = axes.box;
  const at = (edges, place) => {
    for (let i = 0; i + 1 < edges.length; i++) {
      const [low, high] = [edges[i], edges[i + 1]].sort((a, b) => a - b);
      if (low <= place && place < high) return i;
    }
    return -1;
  };
  const column = at(axes.cells.left, (x - left) / (right - left));
  const row = at(axes.cells.top, (y - top) / (bottom - top));
  if (row < 0 || column < 0) return null;
  const value = axes.cells.v[row][column];
  const name = (label, text) => (label ? `${label} ${text}` : text);
  const place = `${name(axes.y, axes.cells.rows[row])}, ${name(axes.x, axes.cells.columns[column])}`;
  return { text: `${place}\n${value === null ? "nothing known" : value}`, spots: [] };
}

function pointsAt(axes, svg, x, y) {
  const on = axes.series.filter((s) => !svg.querySelector(`[id$="-line-${s.id}"]`)?.hasAttribute("hidden"));
  let nearest = null;
  for (const series of on)
    series.p.forEach(([px, py], i) => {
      const far = axes.rows.length ? Math.hypot(px - x, py - y) : Math.abs(px - x) + 0.01 * Math.abs(py - y);
      if (!nearest || far < nearest.far) nearest = { series, i, far, px };
    });
  if (!nearest) return null;
  if (axes.rows.length) {
    const [vx, vy] = nearest.series.v[nearest.i];
    return { text: `${axes.rows[Math.round(vy)] ?? ""}\n${nearest.series.name}: ${vx}`, spots: [nearest.series.p[nearest.i]] };
  }
  const lines = [`${axes.x} ${nearest.series.v[nearest.i][0]}`.trim()];
  const spots = [];
  for (const series of on) {
    let best = 0;
    series.p.forEach(([px], i) => { if (Math.abs(px - nearest.px) < Math.abs(series.p[best][0] - nearest.px)) best = i; });
    if (Math.abs(series.p[best][0] - nearest.px) > 3) continue;
    lines.push(`${series.name}: ${series.v[best][1]}`);
    spots.push(series.p[best]);
  }
  return { text: lines.join("\n"), spots, line: nearest.px };
}

function mark(svg, axes, found) {
  svg.querySelector(".marks")?.remove();
  if (!found) return;
  const group = svg.appendChild(document.createElementNS(SVG, "g"));
  group.setAttribute("class", "marks");
  const add = (kind, attributes) => {
    const element = group.appendChild(document.createElementNS(SVG, kind));
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  };
  if (found.line !== undefined)
    add("line", { id: "cross", x1: found.line, x2: found.line, y1: axes.box[1], y2: axes.box[3] });
  for (const [cx, cy] of found.spots) add("circle", { class: "spot", cx, cy, r: 2 });
}

for (const svg of document.querySelectorAll(".drawing svg")) {
  const drawing = values[svg.closest(".small") ? svg.closest("figure").id + "-small" : svg.closest("figure").id];
  if (!drawing) continue;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * drawing.size[0];
    const y = ((event.clientY - box.top) / box.height) * drawing.size[1];
    const axes = drawing.axes.find(({ box: [l, t, r, b] }) => l - 2 <= x && x <= r + 2 && t - 2 <= y && y <= b + 2);
    const found = axes && (axes.cells ? cellAt(axes, x, y) : pointsAt(axes, svg, x, y));
    mark(svg, axes, found);
    if (found) showTip(found.text, event.clientX, event.clientY);
    else hideTip();
  });
  svg.addEventListener("pointerleave", () => { mark(svg); hideTip(); });
}

// -- series on and off --
for (const button of document.querySelectorAll(".series"))
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", on);
    for (const id of button.dataset.series.split(" "))
      for (const line of button.closest("figure").querySelectorAll(`[id$="-line-${id}"]`)) {
        line.toggleAttribute("hidden", !on);
        line.style.display = on ? "" : "none";
      }
  });

// -- the small pictures of a phone open at a tap --
for (const figure of document.querySelectorAll(".first figure"))
  figure.addEventListener("click", (event) => {
    if (!event.target.closest("button, .term")) figure.classList.toggle("open");
  });

// -- copying, light and dark --
for (const button of document.querySelectorAll(".copy"))
  button.addEventListener("click", async () => {
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });

document.getElementById("scheme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.scheme ? root.dataset.scheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.scheme = dark ? "light" : "dark";
});
