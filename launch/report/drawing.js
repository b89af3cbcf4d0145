"use strict";
// What all charts share: elements, the ramp of colours, smoothing, numbers as text, ticks.

const RAMP_STOPS = 7;

function html(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function shape(tag, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

/** The ordered colour at `share` of the way from data (0) to noise (1). */
function ramp(share) {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP_STOPS - 1);
  const low = Math.min(Math.floor(place), RAMP_STOPS - 2);
  const part = Math.round((place - low) * 100);
  return `color-mix(in oklab, var(--r${low}), var(--r${low + 1}) ${part}%)`;
}

/** Exponential average over both sides, so that the curve does not lag; gaps stay gaps. */
function smooth(values, weight) {
  if (!weight) return values;
  const pass = (order) => {
    const sums = [];
    let sum = 0, norm = 0;
    for (const index of order) {
      const value = values[index];
      if (value != null) { sum = sum * weight + value; norm = norm * weight + 1; }
      sums[index] = [sum, norm];
    }
    return sums;
  };
  const indices = [...values.keys()];
  const before = pass(indices), after = pass([...indices].reverse());
  return values.map((value, index) => (value == null ? null
    : (before[index][0] + after[index][0] - value) / (before[index][1] + after[index][1] - 1)));
}

function quantity(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 999.5) {
    const [unit, letter] = size >= 999.5e6 ? [1e9, "G"] : size >= 999.5e3 ? [1e6, "M"] : [1e3, "k"];
    return `${Number((value / unit).toPrecision(3))}${letter}`;
  }
  if (size > 0 && size < 0.01) return value.toExponential(2).replace(/\.?0*e-/, "e−");
  return String(Number(value.toPrecision(3)));
}

function precise(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  return size >= 999.5 || (size > 0 && size < 0.01) ? quantity(value) : value.toPrecision(4);
}

function linearTicks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1);
  const magnitude = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * magnitude >= raw * 0.999) * magnitude;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, count) {
  const ticks = [];
  for (const factors of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]]) {
    ticks.length = 0;
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of factors) {
        const tick = Number((factor * 10 ** power).toPrecision(3));
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    if (ticks.length >= 3) break;
  }
  const every = Math.ceil(ticks.length / (count + 1));
  return ticks.length < 4 && high < 6 * low ? linearTicks(low, high, count) : ticks.filter((_, index) => index % every === 0);
}

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(share * (sorted.length - 1))))];
}
