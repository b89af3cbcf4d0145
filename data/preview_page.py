"""The page that `kinodit data preview` fills in: one file, no network, light or dark as asked."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{ stats.name }} · preview</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --ink: #1b1f26; --soft: #5f6875; --line: #dfe3e8;
  --accent: #2f66c9; --flag: #a63c06; --flag-back: #fdebdd; --wave: #5b8def;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151a; --card: #1b2028; --ink: #e6e9ee; --soft: #9aa4b2; --line: #2c333e;
    --accent: #7fa9f5; --flag: #ffb583; --flag-back: #3b2415; --wave: #6d9bf5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, nav, main { max-width: 1500px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 24px; }
h1 { font-size: 22px; margin: 0 0 2px; letter-spacing: -0.01em; }
.sub { color: var(--soft); margin: 0 0 16px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 16px; }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; flex: 1 1 240px; }
.panel h2 { font-size: 12px; font-weight: 600; color: var(--soft); margin: 0 0 8px; }
.panel table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.panel td, .panel th { padding: 1px 10px 1px 0; text-align: right; white-space: nowrap;
  font-weight: 400; }
.panel th { color: var(--soft); font-size: 12px; }
.panel td:first-child, .panel th:first-child { text-align: left; }
.panel td:last-child, .panel th:last-child { padding-right: 0; }
.bar { width: 45%; } .bar i { display: block; height: 9px; border-radius: 2px;
  background: var(--accent); min-width: 2px; }
nav { position: sticky; top: 0; z-index: 1; background: var(--page);
  padding-top: 10px; padding-bottom: 10px;
  display: flex; flex-wrap: wrap; gap: 8px; align-items: center;
  border-bottom: 1px solid var(--line); }
nav input { flex: 1 1 220px; max-width: 420px; font: inherit; color: inherit;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 6px 10px; }
nav button { font: inherit; color: inherit; background: var(--card); cursor: pointer;
  border: 1px solid var(--line); border-radius: 99px; padding: 4px 12px; }
nav button[aria-pressed=true] { background: var(--accent); border-color: var(--accent);
  color: var(--page); }
nav button:focus-visible, nav input:focus-visible, .strip:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 1px; }
#count { color: var(--soft); margin-left: auto; }
main { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr));
  padding-top: 16px; padding-bottom: 40px; align-items: start; }
@media (max-width: 460px) { main { grid-template-columns: 1fr; }
  header, nav, main { padding-left: 12px; padding-right: 12px; } }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; }
article[hidden] { display: none; }
.strip { display: block; position: relative; width: 100%; border: 0; padding: 0; background: none; }
button.strip { cursor: pointer; }
.strip img { display: block; width: 100%; }
.strip::after { content: ""; position: absolute; inset: 0; --frame: calc(100% / {{ strip_frames }});
  background: repeating-linear-gradient(90deg, transparent 0 calc(var(--frame) - 2px),
    var(--card) calc(var(--frame) - 2px) var(--frame)); }
.still { display: flex; justify-content: center; background: var(--line); }
.still img { display: block; height: 132px; max-width: 100%; object-fit: contain; }
video { display: block; width: 100%; max-height: 400px; background: #000; }
audio { display: block; width: 100%; height: 34px; }
.wave { display: block; width: 100%; height: 44px; color: var(--wave);
  border-bottom: 1px solid var(--line); }
.text { padding: 10px 14px 12px; }
.caption { margin: 0 0 4px; font-size: 15px; }
.caption small { color: var(--soft); }
.meta { color: var(--soft); margin: 0; font-size: 12px; overflow-wrap: anywhere; }
.flags { display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 6px; }
.flags span { background: var(--flag-back); color: var(--flag); border-radius: 99px;
  padding: 1px 9px; font-size: 12px; }
details { margin-top: 6px; font-size: 12px; color: var(--soft); }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 1px 12px; margin: 6px 0 0; }
dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; }
</style>
</head>
<body>
<header>
<h1>{{ stats.name }}</h1>
<p class="sub">{{ stats.num_samples }} samples in {{ stats.num_shards }} shard(s),
 {{ "%.1f"|format(stats.num_bytes / 1048576) }} MiB · content {{ stats.content_hash[:12] }} ·
 {{ cards|length }} of them shown</p>
<div class="facts">
<section class="panel"><h2>What is in it</h2><table>
<tr><th></th><th>samples</th><th>hours</th><th>with sound</th></tr>
{%- for part in stats.modalities %}
<tr><td>{{ part.modality }}</td><td>{{ part.num_samples }}</td>
<td>{{ "%.2f"|format(part.hours) }}</td><td>{{ part.num_with_audio }}</td></tr>
{%- endfor %}
{%- if stats.num_uncaptioned %}
<tr><td>without caption</td><td>{{ stats.num_uncaptioned }}</td><td></td><td></td></tr>
{%- endif %}
</table></section>
{%- for title, histogram in histograms if histogram %}
{%- set most = histogram|map(attribute=1)|max %}
<section class="panel"><h2>{{ title }}</h2><table>
{%- for label, count in histogram %}
<tr><td>{{ label }}</td><td>{{ count }}</td>
<td class="bar"><i style="width:{{ (100 * count / most)|round(1) }}%"></i></td></tr>
{%- endfor %}
</table></section>
{%- endfor %}
</div>
</header>
<nav aria-label="Filter">
<input id="search" type="search" placeholder="Search captions, keys, scores" aria-label="Search">
{%- for modality in modalities %}
<button data-modality="{{ modality }}" aria-pressed="false">{{ modality }}</button>
{%- endfor %}
{%- for flag in flags %}
<button data-flag="{{ flag }}" aria-pressed="false">⚑ {{ flag }}</button>
{%- endfor %}
<span id="count"></span>
</nav>
<main>
{%- for card in cards %}
<article data-modality="{{ card.modality }}" data-flags="{{ card.flags|join('|') }}">
{%- if card.strip and card.modality == "image" %}
<div class="still"><img src="{{ card.strip }}" alt="{{ card.captions[0].text
 if card.captions else card.key }}"></div>
{%- elif card.strip and card.medium %}
<button class="strip" data-medium="{{ card.medium }}" title="Play"><img src="{{ card.strip }}"
 alt="Frames of {{ card.key }}"></button>
{%- elif card.strip %}
<div class="strip"><img src="{{ card.strip }}" alt="Frames of {{ card.key }}"></div>
{%- endif %}
{%- if card.wave %}
<svg class="wave" viewBox="0 -1 {{ card.wave_width }} 2" preserveAspectRatio="none" role="img"
 aria-label="Sound of {{ card.key }}"><path d="{{ card.wave }}" fill="currentColor"/></svg>
{%- endif %}
{%- if card.modality == "audio" and card.medium %}
<audio controls preload="none" src="{{ card.medium }}"></audio>
{%- endif %}
<div class="text">
{%- if card.flags %}
<div class="flags">{% for flag in card.flags %}<span>⚑ {{ flag }}</span>{% endfor %}</div>
{%- endif %}
{%- for caption in card.captions %}
<p class="caption">{{ caption.text }}{% if card.captions|length > 1 or caption.lang != "en" %}
 <small>{{ caption.lang }} · {{ caption.source }} · {{ caption.weight }}</small>{% endif %}</p>
{%- endfor %}
<p class="meta">{{ card.facts }}</p>
{%- if card.problem %}
<p class="meta">{{ card.problem }}</p>
{%- endif %}
<details><summary>{{ card.key }}</summary><dl>
{%- for name, value in card.details %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{%- endfor %}
</dl></details>
</div>
</article>
{%- endfor %}
</main>
<script>
const cards = [...document.querySelectorAll("article")];
const search = document.getElementById("search");
const buttons = [...document.querySelectorAll("nav button")];
const texts = cards.map(card => card.textContent.toLowerCase());
const pressed = name => buttons.filter(b => b.dataset[name] && b.ariaPressed === "true")
  .map(b => b.dataset[name]);
function filter() {
  const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const modalities = pressed("modality"), flags = pressed("flag");
  let shown = 0;
  cards.forEach((card, i) => {
    const own = card.dataset.flags.split("|");
    const fits = words.every(word => texts[i].includes(word))
      && (!modalities.length || modalities.includes(card.dataset.modality))
      && (!flags.length || flags.some(flag => own.includes(flag)));
    card.hidden = !fits;
    shown += fits;
  });
  document.getElementById("count").textContent = `${shown} of ${cards.length}`;
}
search.addEventListener("input", filter);
buttons.forEach(button => button.addEventListener("click", () => {
  button.ariaPressed = button.ariaPressed === "true" ? "false" : "true";
  filter();
}));
document.querySelectorAll("button.strip").forEach(strip => strip.addEventListener("click", () => {
  const video = document.createElement("video");
  Object.assign(video, {src: strip.dataset.medium, controls: true, loop: true, autoplay: true});
  strip.replaceWith(video);
}));
filter();
</script>
</body>
</html>
"""
