"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");

// --- tables: a click on a heading sorts; what is no number comes last -------------------------------------------
function sortKey(text, numeric) {
  const value = parseFloat(text);
  return numeric ? (Number.isNaN(value) ? null : value) : text.toLowerCase();
}

function sortBy(table, heading) {
  const place = [...heading.parentNode.children].indexOf(heading);
  const numeric = heading.classList.contains("number");
  const before = heading.getAttribute("aria-sort");
  const down = before ? before === "ascending" : numeric;
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [sortKey(row.cells[place].textContent.trim(), numeric), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  for (const heading of table.querySelectorAll("th")) {
    heading.querySelector("button").addEventListener("click", () => sortBy(table, heading));
  }
}

// --- plots: the library is packed in the page ---------------------------------------------------------------------
async function unpacked(element) {
  const bytes = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function plotConfig(narrow) {
  const style = getComputedStyle(document.documentElement);
  const [text, faint, line] = ["--text", "--faint", "--line"].map((name) => style.getPropertyValue(name).trim());
  const legend = { labelColor: text, titleColor: text, symbolLimit: 0, labelLimit: 190, symbolStrokeWidth: 2 };
  const below = { bottom: { anchor: "start", bounds: "full", direction: "vertical" } };
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: line },
    axis: {
      labelColor: faint, titleColor: text, gridColor: line, gridOpacity: 0.5, domainColor: line, tickColor: line,
      labelLimit: narrow ? 120 : 180,
    },
    legend: narrow ? { ...legend, orient: "bottom", columns: 2, labelLimit: 140, layout: below } : legend,
    title: { color: text, anchor: "start" },
    text: { fill: text },
  };
}

let drawing = Promise.resolve();
async function drawAll() {
  const narrow = innerWidth < 640;
  for (const spec of document.querySelectorAll("script.spec")) {
    await vegaEmbed(spec.previousElementSibling, JSON.parse(spec.textContent), {
      mode: "vega-lite", actions: false, renderer: "svg", config: plotConfig(narrow),
      tooltip: { theme: dark.matches ? "dark" : "light" },
    });
  }
  document.documentElement.dataset.drawn = String(1 + Number(document.documentElement.dataset.drawn || 0));
}

async function startPlots(library) {
  try {
    const script = document.createElement("script");
    script.textContent = await unpacked(library);
    document.head.append(script);
  } catch (error) {
    for (const chart of document.querySelectorAll(".chart")) {
      chart.textContent = "This browser is too old to draw the plot; its figures are in the table.";
    }
    return;
  }
  const redraw = () => { drawing = drawing.then(drawAll); };
  redraw();
  dark.addEventListener("change", redraw);
  matchMedia("(max-width: 639px)").addEventListener("change", redraw);
}

const library = document.getElementById("plot-library");
if (library) startPlots(library);

// --- pictures: full and cached under a slider, and their difference ------------------------------------------------
function fill(select, values) {
  const before = select.value;
  select.replaceChildren(...values.map((value) => new Option(value, value)));
  if (values.includes(before)) select.value = before;
}

function show(image, source) {
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 200);
  image.src = source;
}

function startPictures(root) {
  const data = JSON.parse(root.querySelector(".data").textContent);
  const find = (name) => root.querySelector(name);
  const [method, budget, prompt] = [".method", ".budget", ".prompt"].map(find);
  const [stage, slider] = [find(".stage"), find(".slider")];
  const at = () => stage.style.setProperty("--at", `${slider.value}%`);
  const methods = [...new Set(data.entries.map((entry) => entry.method))];
  fill(method, methods);
  prompt.replaceChildren(...data.prompts.map((text, place) => new Option(text, place)));

  function update() {
    const own = data.entries.filter((entry) => entry.method === method.value);
    fill(budget, own.map((entry) => entry.budget));
    const entry = own.find((one) => one.budget === budget.value);
    const picture = entry.pictures[prompt.value];
    show(find("img.full"), data.full[prompt.value]);
    show(find("img.cached"), picture.cached);
    show(find("img.difference"), picture.difference);
    find(".figures").textContent = `${entry.used} computed, ${picture.figures}`;
    find(".thumbnails").replaceChildren(...methods.map(thumbnail).filter(Boolean));
  }

  function thumbnail(name) {
    const own = data.entries.filter((entry) => entry.method === name);
    const entry = own.find((one) => one.budget === budget.value);
    if (!entry) return null;
    const picture = entry.pictures[prompt.value];
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(name === method.value));
    const image = document.createElement("img");
    image.alt = "";
    show(image, picture.cached);
    button.append(image, name, document.createElement("br"), picture.psnr);
    button.addEventListener("click", () => { method.value = name; update(); });
    return button;
  }

  [method, budget, prompt].forEach((select) => select.addEventListener("change", update));
  slider.addEventListener("input", at);
  function drag(event) {
    const box = stage.getBoundingClientRect();
    slider.value = (100 * (event.clientX - box.left)) / box.width;
    at();
  }
  stage.addEventListener("pointerdown", (event) => { stage.setPointerCapture(event.pointerId); drag(event); });
  stage.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
  at();
  update();
}

document.querySelectorAll(".pictures").forEach(startPictures);
