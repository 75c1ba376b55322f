// A line chart of what is now: SVG, a few lines over the last minutes, and their latest values.

import { drawing, element } from "./dom.js";

const WIDTH = 300;
const HEIGHT = 64;

/**
 * A chart as a figure; `update` draws it.
 *
 * @param title what it shows
 * @param names of its lines; at most two, told apart by dashes too
 * @param span seconds from its left to its right edge
 * @param write how a value is written
 * @param top the largest value, if that is fixed
 */
export function chart({ title, names, span, write, top = null }) {
  const values = names.map(() => element("b", {}, "–"));
  const lines = names.map((_, i) => drawing("path", { class: `line line-${i}` }));
  const scale = element("span", { class: "scale quiet", "aria-hidden": "true" });
  const picture = drawing(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title },
    drawing("path", { class: "axis", d: `M0 ${HEIGHT - 0.5}H${WIDTH}` }),
    ...lines,
  );
  const legend = names.map((name, i) =>
    element("span", {}, element("i", { class: `mark mark-${i}` }), `${name} `, values[i]),
  );
  const caption = element(
    "figcaption",
    {},
    element("span", { class: "title" }, title),
    element("span", { class: "legend" }, ...legend),
  );
  const root = element("figure", { class: "chart" }, caption, element("div", { class: "plot" }, picture, scale));

  /** Draw points {time, values}, ascending; a value may be null, which leaves a gap. */
  function update(points) {
    const now = points[points.length - 1];
    const seen = points.flatMap((point) => point.values).filter((value) => value !== null);
    const ceiling = top ?? roundUp(Math.max(0, ...seen));
    lines.forEach((line, i) => {
      let pen = "M";
      let path = "";
      for (const { time, values: at } of points) {
        if (at[i] === null) {
          pen = "M";
          continue;
        }
        const x = WIDTH * (1 - (now.time - time) / span);
        const y = 1 + (HEIGHT - 2) * (1 - Math.min(1, at[i] / ceiling));
        path += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
        pen = "L";
      }
      line.setAttribute("d", path);
    });
    const written = now.values.map((value) => (value === null ? "–" : write(value)));
    written.forEach((text, i) => (values[i].textContent = text));
    scale.textContent = write(ceiling);
    const said = names.map((name, i) => `${name} ${written[i]}`).join(", ");
    picture.setAttribute("aria-label", `${title}, now: ${said}`);
  }

  return { root, update };
}

/** 1, 2 or 5 times a power of ten, at least `value`. */
function roundUp(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999999);
}
