"""Style and behavior of the picture: plain CSS and a few lines of JavaScript, put into the page as they are."""

from __future__ import annotations

from typing import Final

CSS: Final = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c2330; --soft: #5b6577; --line: #d9dee7; --card: #f5f7fa;
  --focus: #1f6feb; --bar: #c3d5f3; --add: #10703c; --del: #b42318;
  --l0: #1f6feb; --l1: #b7791f; --l2: #2f855a; --l3: #9b3fa8; --l4: #c2410c; --l5: #4a5568;
  --matmul: #1f6feb; --attention: #9b3fa8; --norm: #2f855a; --cache: #b7791f; --view: #8a93a3; --other: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --back: #12161d; --ink: #e4e8ef; --soft: #9aa5b8; --line: #2c3440;
  --card: #1a2029; --focus: #79b0ff; --bar: #28436b; --add: #5dd39e; --del: #ff8f85;
  --l0: #79b0ff; --l1: #e2b35a; --l2: #6fcf97; --l3: #d58ae0; --l4: #f4976c; --l5: #a0aec0;
  --matmul: #79b0ff; --attention: #d58ae0; --norm: #6fcf97; --cache: #e2b35a; --view: #7d8798; --other: #f4976c; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.2rem 1.6rem 4rem; background: var(--back); color: var(--ink);
  font: 14px/1.45 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); max-width: 75ch; }
code, .name, .num, .shape, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
table { border-collapse: collapse; font-size: 13px; } th, td { text-align: left; padding: .15rem .9rem .15rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; } td.num, th.num { text-align: right; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.controls { position: sticky; top: 0; z-index: 2; background: var(--back); display: flex; flex-wrap: wrap;
  gap: .6rem 1rem; align-items: center; padding: .6rem 0; border-bottom: 1px solid var(--line); margin-top: 1.4rem; }
.controls fieldset { border: 1px solid var(--line); border-radius: 6px; margin: 0; padding: .15rem .6rem; }
.controls legend { font-size: 11px; color: var(--soft); } .controls label { margin-right: .7rem; white-space: nowrap; }
button, input[type=search] { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .3rem .7rem; }
input[type=search] { min-width: 15rem; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; border-radius: 3px; }
.panels { display: flex; gap: 2.5rem; align-items: flex-start; }
.panel { flex: 1 1 0; min-width: 0; overflow-x: auto; }
body[data-view=before] .after, body[data-view=after] .before { display: none; }
.row, .op > summary, .layer > summary { display: grid; align-items: center; min-width: 50rem; column-gap: .8rem;
  grid-template-columns: var(--rail) minmax(11rem, 1fr) 8.5rem 10.5rem 4.8rem 4.8rem 3.6rem; min-height: 30px; }
.timed .row, .timed .op > summary, .timed .layer > summary { min-width: 56rem;
  grid-template-columns: var(--rail) minmax(11rem, 1fr) 8.5rem 10.5rem 4.8rem 4.8rem 3.6rem 5.5rem; }
.head { font-size: 12px; color: var(--soft); border-bottom: 1px solid var(--line); }
summary { list-style: none; cursor: pointer; } summary::-webkit-details-marker { display: none; }
summary:hover { background: var(--card); }
.layer > summary { font-weight: 600; } .layer > summary .name::before { content: "\\25B8\\00A0"; color: var(--soft); }
.layer[open] > summary .name::before { content: "\\25BE\\00A0"; }
.rail { display: block; height: 30px; } .more .rail, .rail.stretch { height: 100%; }
.rail path { fill: none; stroke-width: 1.7; vector-effect: non-scaling-stroke; } .rail path.l0 { stroke-width: 2.6; }
.rail circle { fill: var(--kind, var(--soft)); stroke: var(--back); stroke-width: 1.5; }
.l0 { stroke: var(--l0); } .l1 { stroke: var(--l1); } .l2 { stroke: var(--l2); } .l3 { stroke: var(--l3); }
.l4 { stroke: var(--l4); } .l5 { stroke: var(--l5); }
.name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-size: 12.5px; }
.tag { font-size: 12px; color: var(--kind, var(--soft)); font-weight: 600; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; } .shape { font-size: 12px; color: var(--soft); white-space: nowrap; }
.num { text-align: right; font-size: 12px; white-space: nowrap; } .num i { font-style: normal; }
.matmul { --kind: var(--matmul); } .attention { --kind: var(--attention); } .norm { --kind: var(--norm); }
.cache { --kind: var(--cache); } .view { --kind: var(--view); } .other { --kind: var(--other); }
.bar { position: relative; } .bar::before { content: ""; position: absolute; right: 0; top: 0; bottom: 0;
  width: calc(var(--share) * 1%); background: var(--bar); z-index: -1; border-radius: 2px; }
.more { display: grid; grid-template-columns: var(--rail) 1fr; column-gap: .8rem; }
.more dl { margin: .2rem 0 .6rem; display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem;
  font-size: 12px; background: var(--card); border-radius: 6px; padding: .5rem .8rem; }
.more dt { color: var(--soft); } .more dd { margin: 0; overflow-wrap: anywhere; }
pre { font-size: 11.5px; overflow-x: auto; background: var(--card); padding: .6rem .8rem; border-radius: 6px;
  margin: .3rem 0; }
pre .add { color: var(--add); } pre .del { color: var(--del); }
.pass > summary { display: grid; grid-template-columns: 14rem 1fr 6rem 9rem; gap: 1rem; padding: .2rem 0;
  border-bottom: 1px solid var(--line); } .pass .changes { margin: .4rem 0; padding-left: 1.2rem; font-size: 12px; }
.pass.idle > summary { color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: 12px; margin: .4rem 0; }
.legend span { color: var(--kind); font-weight: 600; }
[hidden] { display: none !important; }
"""

JAVASCRIPT: Final = """
const body = document.body;
const all = (selector) => [...document.querySelectorAll(selector)];
for (const name of ["view", "step"]) {
  for (const input of all(`input[name=${name}]`)) {
    input.addEventListener("change", () => { body.dataset[name] = input.value; });
  }
}
document.getElementById("expand").addEventListener("click", () => all(".layer").forEach((one) => { one.open = true; }));
document.getElementById("collapse").addEventListener("click", () =>
  all(".layer, .op").forEach((one) => { one.open = false; }));
const search = document.getElementById("search");
search.addEventListener("input", () => {
  const wanted = search.value.trim().toLowerCase();
  for (const op of all(".op")) { op.hidden = wanted !== "" && !op.dataset.text.includes(wanted); }
  for (const layer of all(".layer")) {
    const found = layer.querySelector(".op:not([hidden])") !== null;
    layer.hidden = wanted !== "" && !found;
    if (wanted !== "" && found) { layer.open = true; }
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== search) { event.preventDefault(); search.focus(); }
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (move === undefined || document.activeElement.tagName !== "SUMMARY") { return; }
  const shown = all("summary").filter((one) => one.checkVisibility());
  const next = shown[shown.indexOf(document.activeElement) + move];
  if (next) { event.preventDefault(); next.focus(); }
});
"""
