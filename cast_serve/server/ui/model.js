// The model panel: what was loaded, how sparse each layer is, what it weighs, what runs it.

import { drawing, element } from "./dom.js";
import { bytes, percent, seconds, whole } from "./format.js";

// Where the colour of the strip is full: no layer of a 2:4 model is much sparser.
const FULL = 0.5;

/** The panel for what /v1/cast/info says. */
export function modelPanel(info) {
  return [facts(info), weights(info), sparsity(info), kernels(info)];
}

function facts({ model, device, ranks, load_seconds: load, linears, versions }) {
  const rows = [
    ["Name", model.name],
    ["Architecture", model.architecture],
    ["Format", `${model.format}, ${model.dtype}`],
    ["Linears", `${whole(linears.sparse)} are 2:4, ${whole(linears.dense)} dense`],
    ["Device", ranks > 1 ? `${device}, ${ranks} ranks` : device],
    ["Loaded in", load === null ? "not measured" : seconds(load)],
    ["Versions", `cast-serve ${versions["cast-serve"]}, vLLM ${versions.vllm}, PyTorch ${versions.torch}`],
  ];
  const list = element("dl", { class: "facts" });
  for (const [name, value] of rows) list.append(element("dt", {}, name), element("dd", {}, value));
  return list;
}

function weights({ weights: held }) {
  const parts = [
    ["sparse", "2:4 linears", held.sparse_bytes],
    ["dense", "dense linears", held.dense_linear_bytes],
    ["other", "embeddings and the rest", held.other_bytes],
  ].filter(([, , size]) => size > 0);
  const whole = Math.max(held.bytes, held.bytes_if_dense);
  const text = `${bytes(held.bytes)} of ${bytes(held.bytes_if_dense)} if all was dense (${percent(held.bytes / held.bytes_if_dense)})`;
  const bar = drawing("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", role: "img", "aria-label": text });
  bar.append(drawing("rect", { class: "if-dense", width: (100 * held.bytes_if_dense) / whole, height: 6 }));
  let left = 0;
  for (const [kind, , size] of parts) {
    const width = (100 * size) / whole;
    bar.append(drawing("rect", { class: `bytes-${kind}`, x: left, width, height: 6 }));
    left += width;
  }
  const legend = parts.map(([kind, name, size]) =>
    element("span", {}, element("i", { class: `swatch bytes-${kind}` }), `${name} ${bytes(size)}`),
  );
  return element(
    "section",
    { class: "part" },
    element("h3", {}, "Weights"),
    element("p", {}, text),
    element("div", { class: "bar-chart" }, bar),
    element("p", { class: "legend quiet" }, ...legend),
  );
}

function sparsity({ layers }) {
  const rows = new Map();
  for (const layer of layers) {
    const { kind, block } = place(layer.name);
    if (!rows.has(kind)) rows.set(kind, []);
    rows.get(kind)[block] = layer;
  }
  const strips = [...rows].map(([kind, row]) => strip(kind, row));
  return element(
    "section",
    { class: "part" },
    element("h3", {}, "Zeros by layer"),
    element("div", { class: "strips" }, ...strips.flat()),
    element(
      "p",
      { class: "legend quiet" },
      element("span", {}, element("i", { class: "swatch zeros none" }), "none"),
      element("span", {}, element("i", { class: "swatch zeros full" }), "half or more"),
      element("span", {}, element("i", { class: "swatch unknown" }), "not counted"),
    ),
    layerTable(layers),
  );
}

/** "model.layers.12.mlp.down_proj" is block 12 of the kind "mlp.down_proj". */
function place(name) {
  const match = /^(?:.*?\.)?(\d+)\.(.+)$/.exec(name);
  return match ? { kind: match[2], block: Number(match[1]) } : { kind: name, block: 0 };
}

/** A row of cells, one a block, from the first to the last. */
function strip(kind, row) {
  const cells = drawing("svg", { viewBox: `0 0 ${row.length} 1`, preserveAspectRatio: "none", role: "img" });
  row.forEach((layer, block) => {
    const known = layer.sparsity !== null;
    const share = known ? Math.min(1, layer.sparsity / FULL) : 1;
    const shape = { x: block + 0.04, y: 0, width: 0.92, height: 1, class: known ? "zeros" : "unknown" };
    const title = `${layer.name}: ${known ? percent(layer.sparsity) : "not counted"}`;
    const cell = drawing("rect", { ...shape, "fill-opacity": 0.1 + 0.9 * share });
    cell.append(drawing("title", {}, title));
    cells.append(cell);
  });
  const counted = row.filter((layer) => layer && layer.sparsity !== null).map((layer) => layer.sparsity);
  const range = counted.length
    ? `${percent(Math.min(...counted))} to ${percent(Math.max(...counted))} zeros`
    : "not counted";
  cells.setAttribute("aria-label", `${kind}, ${row.length} blocks: ${range}`);
  return [element("span", { class: "strip-name" }, kind), cells];
}

function layerTable(layers) {
  const header = ["Layer", "Shape", "Zeros", "Held as", "Bytes", "If dense"];
  const body = layers.map((layer) => [
    layer.name,
    layer.shape.join(" × "),
    layer.sparsity === null ? "not counted" : percent(layer.sparsity),
    layer.packed ? "2:4 packed" : layer.sparse ? "2:4 run dense" : "dense",
    bytes(layer.bytes),
    bytes(layer.bytes_if_dense),
  ]);
  const summary = element("summary", {}, `All ${whole(layers.length)} layers`);
  return element("details", {}, summary, table("Layers", header, body));
}

function kernels({ kernels: plans, layers }) {
  const section = element("section", { class: "part" }, element("h3", {}, "Kernels of 2:4 layers"));
  if (!plans.length) {
    section.append(element("p", { class: "quiet" }, "No layer is 2:4."));
    return section;
  }
  const rows = plans.flatMap(({ shape, plan }) => planRows(shape, plan, layers));
  section.append(table("Kernels", ["Layers", "Shape", "Tokens", "Kernel", "Config"], rows));
  if (plans.some(({ plan }) => plan.some(({ kernel }) => kernel === "dense"))) {
    const note = "“dense”: unpacked while loading, and run by vLLM's own linear.";
    section.append(element("p", { class: "quiet" }, note));
  }
  return section;
}

/** A line for each range of tokens; the first names the layers. */
function planRows(shape, plan, layers) {
  const alike = layers.filter((layer) => layer.sparse && String(layer.shape) === String(shape));
  const kinds = [...new Set(alike.map((layer) => place(layer.name).kind.split(".").pop()))];
  let from = 1;
  return plan.map(({ tokens, kernel, config }, i) => {
    const range = tokens === null ? (from === 1 ? "any" : `${from} and more`) : from === tokens ? `${from}` : `${from}–${tokens}`;
    from = tokens + 1;
    return [i ? "" : kinds.join(", "), i ? "" : shape.join(" × "), range, kernel, config || "–"];
  });
}

/** A table that scrolls sideways where it does not fit, by keyboard too. */
function table(label, header, rows) {
  const cells = (tag, texts, attributes = {}) =>
    element("tr", {}, ...texts.map((text) => element(tag, attributes, text)));
  const head = element("thead", {}, cells("th", header, { scope: "col" }));
  const body = element("tbody", {}, ...rows.map((texts) => cells("td", texts)));
  const region = { class: "scroll", role: "region", "aria-label": label, tabindex: "0" };
  return element("div", region, element("table", {}, head, body));
}
