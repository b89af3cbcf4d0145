"use strict";
// One line or area chart in SVG: legend, tooltip, crosshair, drag to zoom, arrow keys.

/** Charts over the same axis: they zoom together and show the same point. */
class Group {
  constructor(onZoom) { this.charts = []; this.range = null; this.onZoom = onZoom; }
  extent() {
    const axes = this.charts.map((chart) => chart.spec.x).filter((x) => x.length);
    return [Math.min(...axes.map((x) => x[0])), Math.max(...axes.map((x) => x[x.length - 1]))];
  }
  zoom(range) { this.range = range; this.charts.forEach((chart) => chart.draw()); this.onZoom(range !== null); }
  point(source, x) { this.charts.forEach((chart) => chart.cross(x, chart === source)); }
}

class Chart {
  /** spec: title, note, x, series [{name, values, color, low?, high?, dashed?, thick?, plain?, rare?}],
      height?, wide?, group?, log?, zero?, top?, stacked?, smoothing?, marks?, broken?, format?, xName?, xTip,
      variants? [{label, series, format?, top?}]. `plain` series are never smoothed, `rare` ones are hidden at first. */
  constructor(host, spec) {
    this.spec = { height: 230, xName: "step", format: precise, smoothing: 0, marks: [], broken: [], ...spec };
    this.hidden = new Set();
    if (spec.variants) Object.assign(this.spec, spec.variants[0]);
    this.spec.series.filter((series) => series.rare).forEach((series) => this.hidden.add(series.name));
    this.plot = html("div", { class: "plot", tabindex: "0" });
    this.tip = html("div", { class: "tip", hidden: true });
    this.legend = html("div", { class: "legend" });
    const head = html("div", { class: "chart-head" }, html("h3", {}, spec.title));
    if (spec.note) head.append(html("span", { class: "chart-note" }, spec.note));
    if (spec.variants && spec.variants.length > 1) head.append(this.variantButtons(spec.variants));
    this.root = html("div", { class: spec.wide ? "chart wide" : "chart" }, head, this.plot, this.legend);
    host.append(this.root);
    this.group = spec.group || new Group(() => {});
    this.group.charts.push(this);
    this.listen();
    this.drawLegend();
    this.plot.style.minHeight = `${this.spec.height}px`;
    this.draw();
    new ResizeObserver(() => requestAnimationFrame(() => {
      if (this.width !== this.plot.clientWidth) this.draw();
    })).observe(this.plot);
  }

  variantButtons(variants) {
    const box = html("div", { class: "segmented", role: "group" });
    variants.forEach((variant, index) => box.append(html("button", {
      type: "button", "aria-pressed": String(index === 0),
      onclick: (event) => {
        [...box.children].forEach((button) => button.setAttribute("aria-pressed", String(button === event.target)));
        this.set(variant);
        this.drawLegend();
      },
    }, variant.label)));
    return box;
  }

  set(changes) { Object.assign(this.spec, changes); this.draw(); }

  shown() { return this.spec.series.filter((series) => !this.hidden.has(series.name)); }

  range() {
    const [low, high] = this.group.range || this.group.extent();
    return low === high ? [low - 1, high + 1] : [low, high];
  }

  /** Smoothed (or stacked) lines as drawn: [{series, line, base?}]. */
  lines() {
    const { stacked, smoothing, x } = this.spec;
    if (!stacked) return this.shown().map((series) => ({ series, line: series.plain ? series.values : smooth(series.values, smoothing) }));
    let base = x.map(() => 0);
    return this.shown().map((series) => {
      const line = base.map((value, index) => value + (series.values[index] || 0));
      const layer = { series, line, base };
      base = line;
      return layer;
    });
  }

  yRange(lines, first, last) {
    const { log, zero, top, stacked } = this.spec;
    const usable = (value) => value != null && (!log || value > 0);
    const drawn = lines.flatMap(({ line }) => line.slice(first, last + 1).filter(usable));
    // Of unsmoothed values and bands the outermost hundredth may leave the frame: spikes, not the curve.
    const raw = stacked ? [] : lines.flatMap(({ series }) => [series.values, series.low || [], series.high || []]
      .flatMap((values) => values.slice(first, last + 1).filter(usable))).sort((a, b) => a - b);
    const all = [...drawn, ...(raw.length ? [quantile(raw, 0.01), quantile(raw, 0.99)] : [])];
    if (!all.length) return [log ? 0.1 : 0, 1];
    let low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
    if (log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.06, high * (high / low) ** 0.06];
    if (zero || stacked) low = Math.min(0, low);
    if (top != null) high = top;
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.5, high + (Math.abs(high) || 1) * 0.5];
    const pad = (high - low) * 0.06;
    return [zero || stacked ? low : low - pad, top != null ? high : high + pad];
  }

  draw() {
    const width = (this.width = this.plot.clientWidth);
    if (!width || !this.spec.x.length) return;
    const { x, log, height, format } = this.spec;
    const [x0, x1] = this.range();
    const first = Math.max(0, x.findIndex((value) => value >= x0) - 1);
    const after = x.findIndex((value) => value > x1);
    const last = after < 0 ? x.length - 1 : after;
    const lines = this.lines();
    const [y0, y1] = this.yRange(lines, first, last);
    const yTicks = log ? logTicks(y0, y1, height / 38) : linearTicks(y0, y1, height / 38);
    const axis = this.spec.axisFormat || quantity;
    const left = Math.max(...yTicks.map((tick) => axis(tick).length), 4) * 6.6 + 12;
    const box = { left, right: width - 8, top: 8, bottom: height - 24 };
    const warp = log ? Math.log10 : (value) => value;
    this.toX = (value) => box.left + ((value - x0) / (x1 - x0)) * (box.right - box.left);
    this.fromX = (pixel) => x0 + ((pixel - box.left) / (box.right - box.left)) * (x1 - x0);
    this.toY = (value) => box.bottom - ((warp(value) - warp(y0)) / (warp(y1) - warp(y0))) * (box.bottom - box.top);
    this.box = box; this.drawn = lines; this.window = [first, last]; this.format = format;

    const id = (this.id ??= `clip-${Chart.count++}`);
    const svg = shape("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": this.summary(lines) });
    const clip = shape("clipPath", { id });
    clip.append(shape("rect", { x: box.left, y: box.top - 4, width: box.right - box.left + 4, height: box.bottom - box.top + 4 }));
    svg.append(clip);
    this.drawAxes(svg, yTicks, axis, x0, x1);
    const inside = shape("g", { "clip-path": `url(#${id})` });
    this.drawMarks(inside);
    for (const layer of lines) this.drawSeries(inside, layer, first, last);
    svg.append(inside);
    this.overlay = shape("g");
    svg.append(this.overlay);
    this.plot.replaceChildren(svg, this.tip);
    this.svg = svg;
  }

  drawAxes(svg, yTicks, axis, x0, x1) {
    const { box } = this;
    const label = (x, y, anchor, content) => {
      const text = shape("text", { x, y, "text-anchor": anchor });
      text.textContent = content;
      svg.append(text);
    };
    for (const tick of yTicks) {
      const y = this.toY(tick);
      svg.append(shape("line", { x1: box.left, x2: box.right, y1: y, y2: y, class: "gridline" }));
      label(box.left - 8, y + 4, "end", axis(tick));
    }
    svg.append(shape("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "baseline" }));
    label(box.left - 8, box.bottom + 17, "end", this.spec.xName);
    const xTicks = linearTicks(x0, x1, (box.right - box.left) / 90);
    for (const tick of xTicks) {
      const x = this.toX(tick);
      if (x < box.left + 12) continue;
      label(x, box.bottom + 17, x > box.right - 16 ? "end" : "middle", quantity(tick));
    }
  }

  drawMarks(inside) {
    const { box } = this;
    for (const mark of this.spec.marks) {
      const x = this.toX(mark.step);
      const line = shape("line", { x1: x, x2: x, y1: box.top, y2: box.bottom, class: `mark-line ${mark.event}` });
      line.append(Object.assign(shape("title"), { textContent: `${mark.event} at step ${mark.step}` }));
      inside.append(line);
    }
    for (const step of this.spec.broken) {
      const x = this.toX(step);
      const sign = shape("path", { d: `M${x - 5},${box.top}h10l-5,8z`, style: "fill: var(--bad)" });
      sign.append(Object.assign(shape("title"), { textContent: `the loss is not a number at step ${step}` }));
      inside.append(sign);
    }
  }

  drawSeries(inside, { series, line, base }, first, last) {
    const { x, log } = this.spec;
    const paint = `stroke: ${series.color}; fill: none`;
    const usable = (value) => value != null && (!log || value > 0);
    const path = (values) => {
      let d = "", pen = false;
      for (let i = first; i <= last; i++) {
        if (!usable(values[i])) { pen = false; continue; }
        d += `${pen ? "L" : "M"}${this.toX(x[i]).toFixed(1)},${this.toY(values[i]).toFixed(1)}`;
        pen = true;
      }
      return d;
    };
    if (base) {
      const back = [];
      for (let i = last; i >= first; i--) back.push(`L${this.toX(x[i]).toFixed(1)},${this.toY(base[i]).toFixed(1)}`);
      inside.append(shape("path", { d: `${path(line)}${back.join("")}Z`, style: `fill: ${series.color}; opacity: 0.82` }));
      return;
    }
    if (series.low) {
      const back = [];
      for (let i = last; i >= first; i--) if (usable(series.low[i])) back.push(`L${this.toX(x[i]).toFixed(1)},${this.toY(series.low[i]).toFixed(1)}`);
      inside.append(shape("path", { d: `${path(series.high)}${back.join("")}Z`, style: `fill: ${series.color}; opacity: 0.13` }));
    } else if (line !== series.values && !series.quiet) {
      inside.append(shape("path", { d: path(series.values), style: `${paint}; opacity: 0.34`, "stroke-width": 1 }));
    }
    const stroke = { "stroke-width": series.thick ? 2.4 : 1.7, "stroke-linejoin": "round", "stroke-linecap": "round" };
    if (series.dashed) stroke["stroke-dasharray"] = "5 4";
    inside.append(shape("path", { d: path(line), style: paint, ...stroke }));
    const few = last - first <= 40 && !series.quiet;
    for (let i = first; i <= last; i++)
      if (usable(line[i]) && (few || (!usable(line[i - 1]) && !usable(line[i + 1]))))
        inside.append(shape("circle", { cx: this.toX(x[i]), cy: this.toY(line[i]), r: few ? 2.4 : 1.8, style: `fill: ${series.color}` }));
  }

  summary(lines) {
    const ends = lines.map(({ series, line }) => {
      const known = line.filter((value) => value != null);
      return `${series.name}: ${precise(known[0])} to ${precise(known[known.length - 1])}`;
    });
    return `${this.spec.title}. ${ends.join("; ")}`;
  }

  drawLegend() {
    const { series, stacked } = this.spec;
    this.legend.replaceChildren();
    if (series.length < 2) return;
    for (const one of series) {
      const swatch = html("span", { class: `swatch${one.dashed ? " dashed" : ""}${stacked ? " area" : ""}`, style: `--swatch: ${one.color}; background: ${one.color}` });
      const button = html("button", {
        type: "button", "aria-pressed": String(!this.hidden.has(one.name)),
        onclick: () => {
          if (!this.hidden.delete(one.name)) this.hidden.add(one.name);
          if (this.hidden.size === series.length) this.hidden.clear();
          this.drawLegend();
          this.draw();
        },
      }, swatch, one.name);
      this.legend.append(button);
    }
  }

  nearest(value) {
    const { x } = this.spec;
    let low = 0, high = x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x[middle] < value) low = middle; else high = middle;
    }
    return value - x[low] <= x[high] - value ? low : high;
  }

  /** Show the point nearest to `x` (null: none), with a tooltip if the pointer is here. */
  cross(x, tip) {
    if (!this.overlay) return;
    this.overlay.replaceChildren();
    this.tip.hidden = true;
    const [x0, x1] = this.range();
    if (x == null || x < x0 || x > x1) return;
    const { box } = this;
    const index = (this.index = this.nearest(x));
    const at = this.toX(this.spec.x[index]);
    if (at < box.left - 1 || at > box.right + 1) return;
    this.overlay.append(shape("line", { x1: at, x2: at, y1: box.top, y2: box.bottom, class: "cross" }));
    const rows = [];
    for (const { series, line } of this.drawn) {
      const value = line[index];
      if (value == null || (this.spec.log && value <= 0)) continue;
      this.overlay.append(shape("circle", { cx: at, cy: this.toY(value), r: 3.4, style: `fill: ${series.color}; stroke: var(--card)`, "stroke-width": 1.5 }));
      rows.push([series, this.spec.stacked ? series.values[index] : value]);
    }
    if (tip && rows.length) this.showTip(at, index, rows);
  }

  showTip(at, index, rows) {
    const head = html("div", { class: "tip-head" }, this.spec.xTip(index));
    const ordered = this.spec.stacked ? [...rows].reverse() : rows;
    this.tip.replaceChildren(head, ...ordered.map(([series, value]) => html("div", { class: "tip-row" },
      html("span", { class: `swatch${series.dashed ? " dashed" : ""}`, style: `--swatch: ${series.color}; background: ${series.color}` }),
      series.name, html("b", {}, this.format(value)))));
    this.tip.hidden = false;
    const width = this.tip.offsetWidth, room = this.plot.clientWidth;
    const left = at + 14 + width <= room ? at + 14 : at - 14 - width;
    this.tip.style.left = `${Math.max(0, Math.min(left, room - width))}px`;
    this.tip.style.top = `${this.box.top}px`;
  }

  listen() {
    let start = null;
    const local = (event) => event.clientX - this.plot.getBoundingClientRect().left;
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button === 0 && this.box) { start = local(event); this.plot.setPointerCapture(event.pointerId); }
    });
    this.plot.addEventListener("pointermove", (event) => {
      if (!this.box) return;
      const x = Math.max(this.box.left, Math.min(this.box.right, local(event)));
      this.group.point(this, this.fromX(x));
      if (start !== null && Math.abs(x - start) > 4) {
        this.tip.hidden = true;
        this.overlay.append(shape("rect", { x: Math.min(x, start), width: Math.abs(x - start), y: this.box.top, height: this.box.bottom - this.box.top, class: "brush" }));
      }
    });
    this.plot.addEventListener("pointerup", (event) => {
      if (start === null) return;
      const x = Math.max(this.box.left, Math.min(this.box.right, local(event)));
      const [low, high] = [this.fromX(Math.min(x, start)), this.fromX(Math.max(x, start))];
      const far = Math.abs(x - start) > 6;
      start = null;
      if (far) this.group.zoom([low, high]);
    });
    this.plot.addEventListener("pointercancel", () => { start = null; });
    this.plot.addEventListener("pointerleave", () => this.group.point(this, null));
    this.plot.addEventListener("blur", () => this.group.point(this, null));
    this.plot.addEventListener("dblclick", () => this.group.zoom(null));
    this.plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") this.group.zoom(null);
      if (!move) return;
      event.preventDefault();
      const stride = event.shiftKey ? Math.ceil(this.spec.x.length / 20) : 1;
      const [first, last] = this.window;
      const index = Math.max(first, Math.min(last, (this.index ?? (move > 0 ? first - 1 : last + 1)) + move * stride));
      this.group.point(this, this.spec.x[index]);
    });
  }
}
Chart.count = 0;
