"use strict";
// Sampled clips: one step at a time with a slider over the steps, or each prompt over all steps.

const SMALL_ROWS = 128;
const samples = data.samples.filter((sample) => sample.entries.length);
const view = byId("sample-view");
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const state = { index: samples.length - 1, playing: !still, mode: "step" };

// Browsers play a limited number of clips: beyond it, only those in view have one loaded.
const MAX_LOADED = 64;
const sources = new WeakMap();

function load(video) {
  if (video.src) return;
  video.src = sources.get(video);
  if (state.playing) video.play().catch(() => {});
}

const nearby = new IntersectionObserver((changes) => {
  for (const { target, isIntersecting } of changes) {
    if (isIntersecting) load(target);
    else if (target.src && videos().length > MAX_LOADED) {
      target.removeAttribute("src");
      target.load();
    }
  }
}, { rootMargin: "300px" });

function frame(entry, step) {
  const small = (entry.height || 0) <= SMALL_ROWS ? "pixels" : "";
  const media = entry.kind === "video"
    ? html("video", { class: small, loop: true, playsinline: true, preload: "auto" })
    : html("img", { src: entry.picture || entry.src, class: small, alt: entry.prompt });
  if (entry.kind === "video") {
    media.muted = true;
    media.addEventListener("loadeddata", () => { media.currentTime = position() * media.duration; });
    sources.set(media, entry.src);
    nearby.observe(media);
  }
  return html("button", {
    type: "button", class: "frame", style: ratio(entry), "aria-label": `Enlarge: ${entry.prompt}, step ${step}`,
    onclick: () => enlarge(entry, step),
  }, media);
}

/** A clip: after the pictures that it was drawn after or together with, and beside the part of it that was given. */
function shown(entry, step) {
  const pictures = entry.pictures || [];
  const images = pictures.map((src, index) => html("img", { src, class: "pixels", alt: `picture ${index + 1} before` }));
  const before = pictures.length ? [html("div", { class: "before" }, ...images)] : [];
  if (!entry.given) return [...before, frame(entry, step)];
  const given = frame({ ...entry, src: entry.given, has_sound: false, prompt: `given: ${entry.prompt}` }, step);
  given.title = "what was given; grey was not";
  return [...before, html("div", { class: "half" }, given, frame(entry, step))];
}

function ratio(entry) {
  return entry.width && entry.height ? `aspect-ratio: ${entry.width} / ${entry.height}` : "";
}

function details(entry) {
  const parts = [];
  if (entry.width) parts.push(`${entry.width} × ${entry.height}`);
  if (entry.num_frames > 1) parts.push(`${entry.num_frames} frames${entry.fps ? ` at ${quantity(entry.fps)} fps` : ""}`);
  if (entry.has_sound) parts.push(entry.kind === "video" ? "with sound: enlarge to hear" : "enlarge to hear");
  if (entry.steps != null) parts.push(`${entry.steps} steps`);
  if (entry.guidance != null) parts.push(`guidance ${quantity(entry.guidance)}`);
  if (entry.seed != null) parts.push(`seed ${entry.seed}`);
  return parts.join(" · ");
}

function enlarge(entry, step) {
  const viewer = byId("viewer");
  const small = (entry.height || 0) <= SMALL_ROWS ? " pixels" : "";
  const media = entry.kind === "video"
    ? html("video", { src: entry.src, class: `big${small}`, style: ratio(entry), controls: true, loop: true, playsinline: true })
    : html("img", { src: entry.picture || entry.src, class: `big${small}`, style: ratio(entry), alt: entry.prompt });
  const sound = entry.kind === "audio" ? [html("audio", { src: entry.src, controls: true, autoplay: true })] : [];
  viewer.replaceChildren(media, ...sound, html("p", {}, entry.prompt), html("small", {}, `step ${step.toLocaleString("en")} · ${details(entry)}`));
  viewer.showModal();
  if (entry.kind === "video") media.play().catch(() => {});
}

byId("viewer").addEventListener("click", (event) => { if (event.target === event.currentTarget) event.currentTarget.close(); });
byId("viewer").addEventListener("close", (event) => event.target.replaceChildren());

const videos = () => [...view.querySelectorAll("video[src]")];

/** Where in their length the clips are, from 0 to 1. */
function position() {
  const playing = videos().find((video) => video.duration && video.readyState > 2);
  return state.playing && playing ? playing.currentTime / playing.duration : Number(time.value);
}
const playButton = html("button", { type: "button", class: "button", onclick: () => play(!state.playing) });
const time = html("input", {
  type: "range", min: 0, max: 1, step: 0.001, value: 0, "aria-label": "Time within the clips",
  oninput: () => {
    play(false);
    // The end itself would show the first frame of the next round.
    videos().forEach((video) => { if (video.duration) video.currentTime = Math.min(time.value, 0.999) * video.duration; });
  },
});

function play(on) {
  state.playing = on;
  playButton.textContent = on ? "Pause" : "Play";
  videos().forEach((video) => (on ? video.play().catch(() => {}) : video.pause()));
}

/** Bring all clips to the same place. */
function align() {
  const place = position();
  videos().forEach((video) => { if (video.duration) video.currentTime = place * video.duration; });
}

function begin() {
  [...view.querySelectorAll("video")].slice(0, MAX_LOADED).forEach(load);
  play(state.playing);
  // Clips start when they have been decoded, one after the other.
  clearTimeout(state.aligning);
  state.aligning = setTimeout(align, 900);
}

function follow() {
  time.value = position();
  requestAnimationFrame(follow);
}

function showStep() {
  const slider = html("input", {
    type: "range", min: 0, max: samples.length - 1, step: 1, value: state.index, "aria-label": "Training step",
    oninput: () => { state.index = Number(slider.value); fill(); },
  });
  const label = html("output");
  const grid = html("div", { class: "clips" });
  const fill = () => {
    const { step, entries } = samples[state.index];
    label.textContent = `step ${step.toLocaleString("en")}`;
    grid.replaceChildren(...entries.map((entry) => html("figure", { class: "clip" },
      ...shown(entry, step), html("figcaption", {}, entry.prompt, html("small", {}, details(entry))))));
    begin();
  };
  const scrub = html("div", { class: "card scrub" }, html("label", {}, "Training step", slider, label), html("label", {}, "Time in clip", time));
  scrub.firstChild.hidden = samples.length < 2;
  view.replaceChildren(scrub, grid);
  fill();
}

function showAll() {
  const prompts = [...new Set(samples.flatMap(({ entries }) => entries.map((entry) => entry.prompt)))];
  const list = html("div", { class: "rows" });
  for (const prompt of prompts) {
    const strip = html("div", { class: "strip", tabindex: "0" });
    for (const { step, entries } of samples)
      for (const entry of entries.filter((one) => one.prompt === prompt))
        strip.append(html("figure", {}, ...shown(entry, step), html("figcaption", {}, `step ${step.toLocaleString("en")}`)));
    list.append(html("div", { class: "card row" }, html("h3", {}, prompt), strip));
    // The newest clips are the ones to see first.
    requestAnimationFrame(() => { strip.scrollLeft = strip.scrollWidth; });
  }
  view.replaceChildren(html("div", { class: "card scrub" }, html("label", {}, "Time in clip", time)), list);
  begin();
}

if (!samples.length) {
  view.append(html("p", { class: "empty" }, "No clips have been sampled: set sample.every_steps and sample.prompts, or run kinodit sample."));
} else {
  const modes = html("div", { class: "segmented", role: "group" });
  for (const [mode, label] of [["step", "One step"], ["all", "All steps"]]) modes.append(html("button", {
    type: "button", "data-mode": mode, onclick: () => show(mode),
  }, label));
  function show(mode) {
    state.mode = mode;
    [...modes.children].forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.mode === mode)));
    if (mode === "step") showStep(); else showAll();
  }
  if (samples.length > 1) byId("sample-controls").append(modes);
  byId("sample-controls").append(playButton);
  show("step");
  requestAnimationFrame(follow);
}
