"""A speculative generation as one page to look at: who proposed each token, what was refused, K and tokens a step.

What the loop records, and :func:`shown` makes readable (``Piece`` is :class:`qpass.runtime.stats.Piece`, a list a row):

    Piece(token, drafted, rejected)    a new token; whether a draft proposed it; the drafted tokens that it replaced
    Piece.by (optional)                the name of the draft that did: "draft", "n-gram", ...
    Round(asked, drafted, accepted, draft_ms, verify_ms)    qpass.runtime.control.Round; asked 0: a plain step

The page is one file without scripts: it loads nothing, follows the reader's light or dark mode, and all text in it is
escaped, whatever a model may write.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpass.runtime.control import Round, Switch

TARGET = "target"
PROMPT = 600
"""A Record keeps this many of a prompt's last characters."""


@dataclass(frozen=True)
class Shown:
    """A piece of text: who proposed it ("target": its own token), and the drafted text that it took the place of."""

    text: str
    by: str = TARGET
    rejected: str = ""


def shown(pieces: Iterable[Any], decode: Callable[[list[int]], str]) -> list[Shown]:
    """One row's pieces as text. A character that several tokens share goes to the token that completes it."""
    found: list[Shown] = []
    before: list[int] = []  # a few earlier tokens, whose text is known: a token's text may depend on what it follows
    pending: list[int] = []
    for piece in pieces:
        pending.append(piece.token)
        known = decode(before)
        text = decode(before + pending)[len(known) :]
        refused = decode([*before, *pending[:-1], *piece.rejected])[len(decode(before + pending[:-1])) :]
        incomplete = text.endswith("\ufffd") and len(pending) < 4
        by = (getattr(piece, "by", None) or "draft") if piece.drafted else TARGET
        found.append(Shown("" if incomplete else text, by, refused if piece.rejected else ""))
        if not incomplete:
            before, pending = [*before, *pending][-8:], []
    if pending and found:
        found[-1] = Shown(decode(before + pending)[len(decode(before)) :], found[-1].by, found[-1].rejected)
    return found


def write_trace(
    path: Path | str,
    rows: Sequence[Sequence[Shown]],
    rounds: Sequence[Round],
    *,
    title: str = "Speculative decoding",
    prompts: Sequence[str] = (),
    switches: Sequence[Switch] = (),
) -> None:
    """Write the page. ``rows``: each row's new text; ``prompts``: what stood before it, shown pale."""
    Path(path).write_text(page(rows, rounds, title=title, prompts=prompts, switches=switches), encoding="utf-8")


def to_settings(stats: Any, tokenizer: Any, input_ids: Any) -> dict[str, Any]:
    """The first row of a generation as plain values, for a Record: text by who proposed it, rounds, switches, prompt."""
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    pieces = shown(stats.pieces[0], lambda ids: str(decode(ids)))
    text = str(decode(input_ids[0]))
    return {
        "pieces": [[piece.text, piece.by, piece.rejected] for piece in pieces],
        "rounds": [
            [r.asked, list(r.drafted), list(r.accepted), round(r.draft_ms, 3), round(r.verify_ms, 3)]
            for r in stats.rounds
        ],
        "switches": [[s.at, s.on] for s in stats.switches],
        "text": text if len(text) <= PROMPT else "\u2026" + text[-PROMPT:],
    }


def section_of(settings: Mapping[str, Any], name: str) -> str:
    """What :func:`to_settings` kept, as a :func:`section`. Raises KeyError, TypeError or ValueError for anything else."""
    row = [Shown(*piece) for piece in settings["pieces"]]
    rounds = [Round(k, tuple(drafted), tuple(taken), *ms) for k, drafted, taken, *ms in settings["rounds"]]
    return section(
        [row], rounds, prompts=[settings["text"]], switches=[Switch(*s) for s in settings["switches"]], name=name
    )


def page(
    rows: Sequence[Sequence[Shown]],
    rounds: Sequence[Round],
    *,
    title: str = "Speculative decoding",
    prompts: Sequence[str] = (),
    switches: Sequence[Switch] = (),
) -> str:
    """The page as HTML that is well-formed XML as well."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>{_safe(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_safe(title)}</h1>
{section(rows, rounds, prompts=prompts, switches=switches)}
</main>
</body>
</html>
"""


def section(
    rows: Sequence[Sequence[Shown]],
    rounds: Sequence[Round],
    *,
    prompts: Sequence[str] = (),
    switches: Sequence[Switch] = (),
    name: str = "refused",
) -> str:
    """Summary, charts and text; needs :data:`COLOURS` and :data:`SECTION`. ``name`` is the switch's, its own on a page."""
    drafts = sorted({piece.by for row in rows for piece in row} - {TARGET}, key=lambda by: (by != "draft", by))
    kinds = {TARGET: "own"} | {by: f"d{i % 4}" for i, by in enumerate(drafts)}
    texts = "\n".join(
        f'<pre class="row">{_prompt(prompts, i)}{"".join(_token(piece, kinds[piece.by]) for piece in row)}</pre>'
        for i, row in enumerate(rows)
    )
    return f"""<div class="trace">
<p class="summary">{_safe(summary(rows, rounds))}</p>
{_charts(rounds, switches)}
<input type="checkbox" class="refused" id="{name}" checked="checked" /><label for="{name}">show what was refused</label>
{_legend(kinds)}
<section class="text">
{texts}
</section>
</div>"""


def summary(rows: Sequence[Sequence[Shown]], rounds: Sequence[Round]) -> str:
    """One line: tokens and steps, what was accepted, where the time went."""
    tokens = sum(map(len, rows))
    judged = sum(len(each.accepted) for each in rounds)
    accepted, drafted = (sum(sum(getattr(each, name)) for each in rounds) for name in ("accepted", "drafted"))
    parts = [f"{tokens} new tokens in {len(rounds)} steps after the first"]
    if judged:
        parts.append(f"{1 + accepted / judged:.2f} tokens a step and row")
    if drafted:
        parts.append(f"{accepted} of {drafted} drafted tokens accepted ({accepted / drafted:.0%})")
    plain = sum(each.asked == 0 for each in rounds)
    if plain:
        parts.append(f"{plain} plain steps")
    draft_ms, verify_ms = sum(each.draft_ms for each in rounds), sum(each.verify_ms for each in rounds)
    if rounds:
        parts.append(f"draft {draft_ms / 1e3:.2f} s, target {verify_ms / 1e3:.2f} s")
    return "; ".join(parts)


def _safe(text: str) -> str:
    """Text that may stand in HTML and XML: escaped, control characters as their pictures."""
    visible = "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "\ufffd" if _forbidden(ord(c)) else c for c in text
    )
    return html.escape(visible)


def _forbidden(code: int) -> bool:
    return 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF)


def _prompt(prompts: Sequence[str], i: int) -> str:
    return f'<span class="prompt">{_safe(prompts[i])}</span>' if i < len(prompts) else ""


def _token(piece: Shown, kind: str) -> str:
    refused = f'<del title="refused">{_safe(piece.rejected.replace(chr(10), "↵"))}</del>' if piece.rejected else ""
    return f'{refused}<span class="{kind}" title="{_safe(piece.by)}">{_safe(piece.text)}</span>'


def _legend(kinds: dict[str, str]) -> str:
    words = {TARGET: "the target's own token", "draft": "proposed by the draft, accepted"}
    items = [
        f'<li><span class="{kind}">{_safe(words.get(by, f"proposed by {by}, accepted"))}</span></li>'
        for by, kind in kinds.items()
    ]
    return f'<ul class="legend">{"".join(items)}<li><del>drafted, refused</del></li></ul>'


def _charts(rounds: Sequence[Round], switches: Sequence[Switch]) -> str:
    if not rounds:
        return ""
    tokens = [1 + sum(each.accepted) / max(1, len(each.accepted)) for each in rounds]
    asked = [float(each.asked) for each in rounds]
    hints = [
        f"step {i + 1}: " + ("plain" if not each.asked else f"K {each.asked}, drafted {_each(each.drafted)}")
        + f", accepted {_each(each.accepted)}; draft {each.draft_ms:.1f} ms, target {each.verify_ms:.1f} ms"
        for i, each in enumerate(rounds)
    ]  # fmt: skip
    marks = "".join(
        f'<line class="{"on" if each.on else "off"}" x1="{each.at}" x2="{each.at}" y1="0" y2="1">'
        f"<title>speculation switched {'on' if each.on else 'off'} before step {each.at + 1}</title></line>"
        for each in switches
    )
    return (
        '<section class="charts">'
        + _chart("K, drafted tokens asked for", asked, hints, "k", marks)
        + _chart("new tokens a step (mean over the rows)", tokens, hints, "t", "")
        + "</section>"
    )


def _each(numbers: Sequence[int]) -> str:
    return " / ".join(map(str, numbers))


def _chart(name: str, values: Sequence[float], hints: Sequence[str], kind: str, marks: str) -> str:
    """Bars over the steps, in an SVG that stretches to any width; its axes are text beside and below it."""
    top = max(1.0, *values)
    bars = "".join(
        f'<g><rect class="hover" x="{i}" y="0" width="1" height="1" />'
        f'<rect x="{i + 0.08:.2f}" y="{1 - value / top:.4f}" width="0.84" height="{value / top:.4f}" />'
        f"<title>{_safe(hint)}</title></g>"
        for i, (value, hint) in enumerate(zip(values, hints, strict=True))
    )
    return (
        f'<figure class="{kind}"><figcaption>{_safe(name)}</figcaption><div class="plot">'
        f'<div class="y"><span>{top:.3g}</span><span>0</span></div>'
        f'<svg viewBox="0 0 {len(values)} 1" preserveAspectRatio="none" role="img" aria-label="{_safe(name)}">'
        f'{bars}{marks}</svg></div><div class="x"><span>step 1</span><span>{len(values)}</span></div></figure>'
    )


COLOURS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #22272e; --pale: #5c6672; --line: #d5dae1;
  --d0: #cfe3fa; --d1: #fbdcb8; --d2: #d9ecd0; --d3: #e6d9f5; --bar: #2f6db5; --bar2: #3a8f5c; --no: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #e4e7eb; --pale: #98a2ae; --line: #343b44;
    --d0: #1f4470; --d1: #6b4313; --d2: #2c5228; --d3: #4b3470; --bar: #6ea8ea; --bar2: #6cc28d; --no: #ff9b92; } }
"""

SECTION = """
.trace .summary { color: var(--pale); margin: 0 0 1rem; }
.trace .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 2rem; margin-bottom: 1rem; }
.trace figure { margin: 0; } .trace figcaption { font-size: .85rem; color: var(--pale); margin-bottom: .3rem; }
.trace .plot { display: flex; gap: .4rem; height: 6rem; }
.trace .y, .trace .x { display: flex; justify-content: space-between; font-size: .75rem; color: var(--pale); }
.trace .y { flex-direction: column; text-align: right; min-width: 1.6rem; line-height: 1; }
.trace .x { margin-left: 2rem; }
.trace svg { flex: 1; min-width: 0; height: 100%; border-bottom: 1px solid var(--line); overflow: visible; }
.trace .k rect { fill: var(--bar); } .trace .t rect { fill: var(--bar2); }
.trace svg rect.hover { fill: transparent; } .trace g:hover rect.hover { fill: var(--line); }
.trace svg line { stroke: var(--no); stroke-width: 1.5; vector-effect: non-scaling-stroke; stroke-dasharray: 3 3; }
.trace svg line.on { stroke: var(--bar2); }
.trace label { font-size: .85rem; margin-left: .3rem; }
.trace .legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: .5rem 0 1rem; font-size: .85rem; }
.trace .row { margin: 0 0 1rem; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 6px; font: 14px/1.75 ui-monospace, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; tab-size: 4; }
.trace .prompt { color: var(--pale); }
.trace .own { border-bottom: 1.5px solid var(--pale); }
.trace .d0, .trace .d1, .trace .d2, .trace .d3 { border-radius: 3px; padding: .1em 0; box-shadow: inset 1px 0 var(--paper); }
.trace .d0 { background: var(--d0); } .trace .d1 { background: var(--d1); border-bottom: 2px dotted; }
.trace .d2 { background: var(--d2); border-bottom: 2px dashed; } .trace .d3 { background: var(--d3); border-bottom: 2px double; }
.trace .row span:hover { outline: 1px solid var(--ink); }
.trace del { color: var(--no); font-size: .78em; opacity: .85; }
.trace .refused:not(:checked) ~ .text del { display: none; }
@media print { .trace .own, .trace .d0, .trace .d1, .trace .d2, .trace .d3 { print-color-adjust: exact; } }
"""

STYLE = (
    COLOURS
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.2rem; }
h1 { font-size: 1.25rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
"""
    + SECTION
)
