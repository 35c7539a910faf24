"""How the report looks: phone, desk and paper, light and dark."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f7f8fa; --ink: #1f242b; --pale: #5c6672; --line: #d8dde4; --grid: #e6e9ee;
  --c0: #2f6db5; --c1: #c9621a; --c2: #36875a; --c3: #a13d63; --c4: #7463b5; --c5: #647180; --c6: #94801f; --c7: #1f8a94; --limit: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --card: #1b1f25; --ink: #e4e7eb; --pale: #9aa4b0; --line: #363d47; --grid: #2a3038;
    --c0: #6aa5e8; --c1: #f0924e; --c2: #6cc28d; --c3: #e286a8; --c4: #ab9bea; --c5: #98a5b4; --c6: #d3bd55; --c7: #5bc3cd; --limit: #ff9b92; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 3rem 0 .3rem; padding-top: 1rem; border-top: 2px solid var(--ink); overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0 .9rem; max-width: 68ch; } .pale, .note { color: var(--pale); } .note { font-size: .86rem; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
a { color: var(--c0); }
.lead { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1rem 0; padding: 0; list-style: none; }
.lead li { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.lead b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; } .lead span { color: var(--pale); font-size: .86rem; }
.scroll { overflow-x: auto; margin: .6rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: baseline; }
th { font-weight: 600; color: var(--pale); border-bottom: 1.5px solid var(--pale); vertical-align: bottom; white-space: normal; min-width: 3.6rem; line-height: 1.25; }
th:first-child, td:first-child, .left { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); z-index: 1; }
td small { color: var(--pale); } tr.peer td:first-child { font-style: italic; } tr.base { color: var(--pale); }
td.best { font-weight: 700; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.6rem 2.4rem; margin: 1rem 0; align-items: start; }
figure { margin: 0; max-width: 36rem; break-inside: avoid; } figcaption { font-weight: 600; margin-bottom: .5rem; font-size: .95rem; }
svg.figure { display: block; width: 100%; height: auto; overflow: visible; color: var(--ink); }
svg text { fill: currentColor; font-size: 13px; font-variant-numeric: tabular-nums; } svg text.tick { fill: var(--pale); font-size: 12px; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; } svg text.inside { fill: var(--paper); font-weight: 600; } svg text.name { font-size: 12px; }
.grid { stroke: var(--grid); stroke-width: 1; fill: none; } .reference { stroke: var(--ink); stroke-width: 1; fill: none; }
.whisker { stroke: var(--ink); stroke-width: 1.2; fill: none; opacity: .75; } .limit { stroke: var(--limit); stroke-width: 2; fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dashed { stroke-dasharray: 5 4; stroke-width: 1.6; }
.dim { opacity: .55; }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); } .c4 { fill: var(--c4); } .c5 { fill: var(--c5); } .c6 { fill: var(--c6); } .c7 { fill: var(--c7); }
.l0 { stroke: var(--c0); } .l1 { stroke: var(--c1); } .l2 { stroke: var(--c2); } .l3 { stroke: var(--c3); } .l4 { stroke: var(--c4); } .l5 { stroke: var(--c5); } .l6 { stroke: var(--c6); } .l7 { stroke: var(--c7); }
ul.legend { list-style: none; padding: 0; margin: .5rem 0 0; display: flex; flex-wrap: wrap; gap: .15rem 1rem; font-size: .86rem; }
ul.legend svg.key { width: 22px; height: 8px; margin-right: .4rem; vertical-align: middle; }
.doubt { border-left: 3px solid var(--limit); padding: .3rem .8rem; background: var(--card); font-size: .9rem; } .doubt ul { margin: .2rem 0; padding-left: 1.1rem; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--c0); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; } dt { color: var(--pale); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { main { padding: 1rem .9rem 3rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } th, td { padding: .4rem .5rem; } td:first-child, th:first-child { min-width: 7.2rem; max-width: 9.5rem; white-space: normal; overflow-wrap: break-word; } }
@media print {
  :root { color-scheme: light; --paper: #fff; --card: #fff; --ink: #000; --pale: #444; --line: #bbb; --grid: #ddd;
    --c0: #2f6db5; --c1: #c9621a; --c2: #36875a; --c3: #a13d63; --c4: #7463b5; --c5: #647180; --c6: #94801f; --c7: #1f8a94; --limit: #b3261e; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; } nav, summary { display: none; } .scroll { overflow: visible; } table { font-size: 8pt; }
  th, td { padding: .2rem .3rem; white-space: normal; } tr, figure, .lead li { break-inside: avoid; } h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; display: block; }
  svg rect, svg circle { print-color-adjust: exact; -webkit-print-color-adjust: exact; } th:first-child, td:first-child { position: static; } }
"""
