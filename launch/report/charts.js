"use strict";
// What is drawn: the charts of each section, and the controls of the page.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const reset = byId("reset-zoom");
const steps = new Group((zoomed) => { reset.hidden = !zoomed; });
reset.addEventListener("click", () => steps.zoom(null));

const train = data.train, validation = data.validation;
const percent = (value) => (value == null ? "–" : `${Number(value.toPrecision(3))}%`);
const inSeconds = (value) => (value == null ? "–" : value < 1 ? `${Number((value * 1000).toPrecision(3))} ms` : `${Number(value.toPrecision(3))} s`);
const PALETTE = [0, 1, 2, 3, 4, 5].map((index) => `var(--c${index})`);

function stepTip(x, hours) {
  return (index) => {
    const parts = [`step ${x[index].toLocaleString("en")}`];
    const time = hours && hours[index];
    if (time) parts.push(time >= 1 ? `${time.toFixed(2)} h` : `${(time * 60).toFixed(1)} min`);
    return parts.join(" · ");
  };
}

function line(name, column, color, extra = {}) {
  return { name, values: column.mean, low: column.low, high: column.high, color, ...extra };
}

const overTrain = { x: train.step, xTip: stepTip(train.step, train.time_h), group: steps };
const overValidation = { x: validation.step, xTip: stepTip(validation.step), group: steps };
const each = train.rows_per_point > 1 ? `mean and range of ${train.rows_per_point} rows per point` : "";
const marked = [...new Set(data.marks.map((mark) => mark.event))].map((event) => (event === "resume" ? "resumed" : event)).join(", ");
const dotted = marked && `dotted: ${marked}`;
const smoothed = [], logarithmic = [];

function addLoss(host) {
  const { columns } = train;
  if (columns.loss) {
    const parts = Object.keys(columns).filter((name) => name.startsWith("loss/"));
    const several = parts.length > 1 ? parts : [];
    const chart = new Chart(host, {
      ...overTrain, title: "Training loss", note: [each, dotted].filter(Boolean).join("; "), wide: true, height: 300, marks: data.marks, broken: train.broken,
      series: [
        line("loss", columns.loss, PALETTE[0], { thick: true }),
        ...several.map((name, index) => line(name.slice(5), columns[name], PALETTE[index + 1])),
      ],
    });
    smoothed.push(chart);
    logarithmic.push(chart);
  }
  addNoiseBins(host);
  addValidation(host);
  if (!host.children.length) host.append(html("p", { class: "empty" }, "No losses have been logged."));
}

function addNoiseBins(host) {
  const modalities = Object.entries(train.bins);
  if (!modalities.length) return;
  const variants = modalities.map(([modality, { edges, values, rare }]) => ({
    label: modality,
    series: edges.map(([low, high], index) => ({
      name: `t ${quantity(low)}–${quantity(high)}`, values: values[index], color: ramp((low + high) / 2), quiet: true,
      rare: rare[index],
    })),
  }));
  const chart = new Chart(host, { ...overTrain, title: "Training loss by noise level", note: "t = 0 is data, t = 1 is noise", variants, height: 260 });
  smoothed.push(chart);
  logarithmic.push(chart);
  addProfile(host, modalities);
}

/** Loss over the noise level, at a few times of the run. */
function addProfile(host, modalities) {
  const { profiles } = train;
  if (!profiles.length) return;
  const variants = modalities.map(([modality]) => {
    const curves = profiles.map(({ curves }) => new Map(curves[modality] || []));
    const x = [...new Set(curves.flatMap((curve) => [...curve.keys()]))].sort((a, b) => a - b);
    return {
      label: modality, x,
      series: profiles.map(({ step }, index) => ({
        name: `step ${quantity(step)}`,
        values: x.map((t) => curves[index].get(t) ?? null),
        color: `color-mix(in oklab, var(--c0), var(--card) ${[58, 38, 18, 0][index]}%)`,
        thick: index === profiles.length - 1,
      })),
    };
  });
  const chart = new Chart(host, {
    variants, title: "Loss over the noise level", note: "from data (0) to noise (1)", height: 260, xName: "t",
    xTip: (index) => `t = ${quantity(chart.spec.x[index])}`,
  });
  logarithmic.push(chart);
}

function addValidation(host) {
  const { columns, bins, step } = validation;
  if (!step.length) return;
  const modalities = Object.keys(columns).filter((name) => name === "loss" || name.startsWith("loss/"));
  const variants = modalities.map((name) => {
    const modality = name.slice(5);
    const levels = bins[modality] ? bins[modality].levels : [];
    const shuffled = columns[`loss_shuffled_captions/${modality}`];
    return {
      label: modality || "all",
      series: [
        { name: "mean", values: columns[name], color: "var(--ink)", thick: true },
        ...(shuffled ? [{ name: "mean, shuffled captions", values: shuffled, color: "var(--ink-3)", dashed: true }] : []),
        ...levels.map((level, index) => ({ name: `t ${quantity(level)}`, values: bins[modality].values[index], color: ramp(level) })),
      ],
    };
  });
  if (!variants.length) return;
  const chart = new Chart(host, { ...overValidation, title: "Validation loss", note: "at fixed noise", variants, wide: true, height: 280 });
  logarithmic.push(chart);
}

function addTraining(host) {
  const { columns } = train;
  if (columns.grad_norm) {
    smoothed.push(new Chart(host, { ...overTrain, title: "Gradient norm", note: "before clipping", log: true, series: [line("norm", columns.grad_norm, PALETTE[4])] }));
  }
  if (columns.lr) new Chart(host, { ...overTrain, title: "Learning rate", zero: true, format: (value) => value.toExponential(3), series: [{ name: "rate", values: columns.lr.mean, color: PALETTE[2] }] });
  if (columns["moe/violation"]) {
    smoothed.push(new Chart(host, { ...overTrain, title: "Load of experts", note: "largest over the mean less 1, worst layer; 0 is even", zero: true, series: [line("violation", columns["moe/violation"], PALETTE[1])] }));
    smoothed.push(new Chart(host, { ...overTrain, title: "Entropy of routers", note: "1: all experts alike", zero: true, series: [line("entropy", columns["moe/entropy"], PALETTE[3])] }));
    if (columns["moe/router_grad_norm"]) {
      smoothed.push(new Chart(host, { ...overTrain, title: "Gradient norm of routers", note: "all routers together, before clipping", log: true, series: [line("norm", columns["moe/router_grad_norm"], PALETTE[4])] }));
    }
    const dropped = columns["moe/dropped"];
    if (dropped && dropped.mean.some((share) => share > 0)) {
      smoothed.push(new Chart(host, { ...overTrain, title: "Dropped tokens", note: "share that found no expert, mean of layers", zero: true, series: [line("share", dropped, PALETTE[1])] }));
    }
  }
  if (!host.children.length) host.append(html("p", { class: "empty" }, "Nothing has been logged."));
}

function addSpeed(host) {
  const { columns, parts } = train;
  const rates = [["tokens_per_s", "tokens/s"], ["samples_per_s", "samples/s"]].filter(([key]) => columns[key]);
  if (rates.length) {
    const variants = rates.map(([key, label]) => ({ label, series: [line(label, columns[key], PALETTE[0])] }));
    new Chart(host, { ...overTrain, title: "Throughput", zero: true, variants });
  }
  if (columns.mfu) {
    const times100 = (values) => values && values.map((value) => (value == null ? null : value * 100));
    const { mean, low, high } = columns.mfu;
    const series = [{ name: "MFU", values: times100(mean), low: times100(low), high: times100(high), color: PALETTE[2] }];
    new Chart(host, { ...overTrain, title: "MFU", note: "model FLOPs over the peak", zero: true, format: percent, axisFormat: (value) => `${quantity(value)}%`, series });
  }
  addTimeSplit(host, parts);
  if (!host.children.length) host.append(html("p", { class: "empty" }, "Nothing has been logged."));
}

function addTimeSplit(host, parts) {
  const names = Object.keys(parts);
  if (!names.length) return;
  const order = { compute: 0, encoding: 4, data: 1, checkpoint: 3, evaluation: 2 };
  const color = (name) => (name in order ? PALETTE[order[name]] : "var(--ink-3)");
  const used = names.filter((name) => parts[name].some((value) => value > 0));
  const sums = train.step.map((_, index) => used.reduce((sum, name) => sum + (parts[name][index] || 0), 0));
  const seconds = used.map((name) => ({ name, values: parts[name], color: color(name) }));
  const shares = used.map((name) => ({ name, values: parts[name].map((value, index) => (sums[index] ? (100 * value) / sums[index] : 0)), color: color(name) }));
  const total = sums.reduce((a, b) => a + b, 0);
  const overall = used.map((name) => `${name} ${percent((100 * parts[name].reduce((a, b) => a + b, 0)) / total)}`);
  new Chart(host, {
    ...overTrain, title: "Where a step's time goes", note: overall.join(", "), wide: true, stacked: true, height: 240,
    variants: [
      { label: "share", series: shares, top: 100, format: percent, axisFormat: (value) => `${quantity(value)}%` },
      { label: "seconds", series: seconds, top: null, format: inSeconds, axisFormat: quantity },
    ],
  });
}

addLoss(byId("loss-charts"));
addTraining(byId("training-charts"));
addSpeed(byId("speed-charts"));

const slider = byId("smoothing"), sliderValue = byId("smoothing-value");
// As much as the number of rows bears: smoothing a dozen would only hide them.
slider.value = train.step.length < 30 ? 0 : train.step.length < 400 ? 0.8 : 0.95;
function applySmoothing() {
  sliderValue.textContent = Number(slider.value).toFixed(2);
  smoothed.forEach((chart) => chart.set({ smoothing: Number(slider.value) }));
}
slider.addEventListener("input", applySmoothing);
applySmoothing();
byId("log-axis").addEventListener("change", (event) => logarithmic.forEach((chart) => chart.set({ log: event.target.checked })));
byId("loss-controls").hidden = !logarithmic.length;

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

const openConfig = byId("open-config");
if (openConfig) openConfig.addEventListener("click", () => {
  const all = [...document.querySelectorAll(".config details")];
  const open = all.some((section) => !section.open);
  all.forEach((section) => { section.open = open; });
  openConfig.textContent = open ? "Close all" : "Open all";
});

const rows = [...document.querySelectorAll("#events tbody tr")];
const kinds = [...new Set(rows.map((row) => row.dataset.event))];
if (kinds.length > 1) for (const kind of kinds) {
  const chip = html("button", {
    type: "button", class: "chip", "aria-pressed": "true",
    onclick: () => {
      const shown = chip.getAttribute("aria-pressed") !== "true";
      chip.setAttribute("aria-pressed", String(shown));
      rows.filter((row) => row.dataset.event === kind).forEach((row) => { row.hidden = !shown; });
    },
  }, `${kind} ${rows.filter((row) => row.dataset.event === kind).length}`);
  byId("event-filter").append(chip);
}
