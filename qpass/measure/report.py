"""Records as one page to look at: self-contained, without scripts, for phone, desk and paper, in light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qpass.measure import report_figures as figures
from qpass.measure.record import Record
from qpass.measure.report_data import COSTS, Case, Model, Row, linears, machine_of, models
from qpass.measure.report_style import STYLE
from qpass.measure.report_svg import safe, short

COST_TITLES = {
    "load": "load, s",
    "compile_cold": "compile cold, s",
    "compile_warm": "compile warm, s",
    "peak_load": "peak while loading, MB",
    "peak_compile": "peak while compiling, MB",
    "peak_run": "peak while running, MB",
    "rss": "held, MB",
}


def page(
    records: Iterable[Record],
    title: str,
    *,
    traces: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    style: str = "",
) -> str:
    """HTML that is well-formed XML as well. ``traces``: by model, headlines and finished HTML of speculative
    generations, which ``style`` is for. Every string of a record is escaped."""
    records = list(records)
    found, layers = models(records), linears(records)
    parts = [_lead(found)]
    parts += [_model(m, f"m{i}", (traces or {}).get(m.name, ())) for i, m in enumerate(found)]
    if layers:
        parts.append('<section id="layers"><h2>One linear layer against the machine\u2019s limits</h2>')
        parts.append(
            "<p>Weights streamed from memory, candidates in turns, the limits measured between the turns. Few tokens are "
            "bound by the memory\u2019s read rate, many by arithmetic.</p>"
        )
        parts += [figures.roofline(machine, n, k, names) for (machine, n, k), names in layers.items()]
        parts.append("</section>")
    parts.append(_machines(records))
    links = [(f"m{i}", m.name) for i, m in enumerate(found)] + [("layers", "one layer")] * bool(layers)
    links.append(("machines", "machines"))
    nav = "".join(f'<li><a href="#{to}">{safe(name)}</a></li>' for to, name in links)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>{safe(title)}</title>
<style>{style}{STYLE}</style>
</head>
<body>
<main>
<h1>{safe(title)}</h1>
<nav aria-label="sections"><ul>{nav}</ul></nav>
{"".join(parts)}
</main>
</body>
</html>
"""


def _lead(found: Sequence[Model]) -> str:
    """The headline numbers: of the case with the largest gain a token, ours against the baseline."""
    best: tuple[float, Model, Case, Row] | None = None
    for model in found:
        for case in model.cases:
            for row in case.rows:
                gain = row.speed_up("tpot")
                if gain and not row.peer and row.over is not row and (best is None or gain > best[0]):
                    best = gain, model, case, row
    if best is None:
        return ""
    gain, model, case, row = best
    cards = [(f"{gain:.1f}x", "faster a token than bf16"), (f"{short(row.records['tpot'].value)} ms", "a token (TPOT)")]
    first = row.speed_up("ttft")
    if first:
        cards.append((f"{first:.1f}x", "faster to the first token"))
    share = row.records["tpot"].share_of_limit
    if share is not None:
        drafted = "tokens_a_step" in row.records["tpot"].settings
        cards.append((f"{share:.0%}", "of its own bound" if drafted else "of the memory\u2019s bandwidth"))
    items = "".join(f"<li><b>{safe(number)}</b><span>{safe(words)}</span></li>" for number, words in cards)
    return (
        f'<p class="pale">{safe(model.name)} in {safe(row.label)}, {case.prompt}-token prompt, batch {case.batch}, '
        f'{safe(model.machine)}:</p><ul class="lead">{items}</ul>'
    )


def _model(model: Model, anchor: str, traces: Sequence[tuple[str, str]]) -> str:
    parts = [f'<section id="{anchor}"><h2>{safe(model.name)}</h2><p class="pale">{safe(model.machine)}</p>']
    for i, case in enumerate(model.cases):
        parts.append(_case(model, case, first=i == 0))
    if model.absent:
        items = "".join(
            f"<li>{safe(r.settings.get('variant'))}: {safe(r.settings.get('reason'))}</li>" for r in model.absent
        )
        parts.append(f'<h3>Not measured</h3><ul class="note">{items}</ul>')
    shown = [figures.verification(model), figures.pareto(model)]
    if any(shown):
        parts.append(f'<div class="figures">{"".join(shown)}</div>')
    parts.append(_quality(model))
    parts.append(_costs(model))
    parts += [figures.profile(r) for r in model.profiles]
    for headline, body in traces:
        parts.append(f"<h3>{safe(headline)}</h3>{body}")
    parts.append("</section>")
    return "".join(parts)


def _case(model: Model, case: Case, first: bool) -> str:
    s = case.settings
    speeds = [row.records["tpot"] for row in case.rows if "tpot" in row.records]
    counts = sorted({r.n for r in speeds})
    commits = ", ".join(dict.fromkeys(r.commit for r in speeds))
    turns = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") if counts else ""
    bandwidth = f", {short(float(s['bandwidth_gbps']))} GB/s read" if "bandwidth_gbps" in s else ""
    words = (
        f"{case.prompt}-token prompt, {s.get('new', '?')} new tokens, batch {case.batch}, greedy, {s.get('threads', '?')} threads"
        f"{bandwidth}; medians of {turns} turns, commit {commits}"
    )
    beside = ", beside other engines" if case.beside else ""
    heading = f"<h3>{case.prompt}-token prompt, batch {case.batch}{beside}</h3>"
    table = _recipes(model, case)
    drawn = f'<div class="figures">{figures.times(case, "tpot")}{figures.times(case, "ttft")}</div>'
    doubts = _doubts(case)
    if first or case.beside:
        return f'{heading}<p class="note">{safe(words)}</p>{table}{doubts}{drawn}'
    return (
        f'{heading}<p class="note">{safe(words)}</p>{drawn}<details><summary>numbers</summary>{table}</details>{doubts}'
    )


def _recipes(model: Model, case: Case) -> str:
    """The recipe table: what is stored, quality, TTFT and TPOT with their gains and shares, bytes read."""
    quality = any(model.passed(row.scheme) for row in case.rows)
    perplexity = any("perplexity" in model.quality.get(row.scheme, {}) for row in case.rows)
    head = ["recipe", *["HumanEval pass@1"] * quality, *["perplexity"] * perplexity]
    head += ["TTFT ms", "gain", "of the peak", "TPOT ms", "gain", "of the limit", "tokens/s", "MB read a step"]
    best = {
        what: min((row.records[what].value for row in case.rows if what in row.records), default=None)
        for what in ("ttft", "tpot")
    }
    rows = []
    for row in case.rows:
        cells = [f"<td>{safe(row.label)}</td>"]
        if quality:
            passed = model.passed(row.scheme)
            cells.append(f"<td>{_percent(passed)}</td>" if passed else "<td>-</td>")
        if perplexity:
            found = model.quality.get(row.scheme, {}).get("perplexity")
            cells.append(f"<td>{found.value:.3f}</td>" if found else "<td>-</td>")
        for what in ("ttft", "tpot"):
            record, gain = row.records.get(what), row.speed_up(what)
            if record is None:
                cells += ["<td>-</td>"] * 3
                continue
            mark = ' class="best"' if record.value == best[what] else ""
            cells.append(f"<td{mark}>{short(record.value)}</td>")
            cells.append(f"<td>{gain:.2f}x</td>" if gain else "<td>-</td>")
            share = record.share_of_limit
            star = "*" if what == "tpot" and "tokens_a_step" in record.settings else ""
            cells.append(f"<td>{share:.0%}{star}</td>" if share is not None else "<td>-</td>")
        speed, size = row.records.get("throughput"), row.megabytes
        cells.append(f"<td>{short(speed.value)}</td>" if speed else "<td>-</td>")
        cells.append(f"<td>{size:.0f}</td>" if size else "<td>-</td>")
        kind = "base" if row.over is row else "peer" if row.peer else ""
        rows.append(f"<tr{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{''.join(cells)}</tr>")
    notes = "Gains are over the first row. The limit of a token is what a step must read over the memory\u2019s read rate, that of a first token its arithmetic over the peak, both measured between the turns."
    if any("tokens_a_step" in r.settings for row in case.rows for r in row.records.values()):
        notes += " * With a draft: of the bound that its own acceptance and costs allow; its text, and so its quality, is the scheme\u2019s."
    return f'{_table(head, rows)}<p class="note">{notes}</p>'


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col">{safe(name)}</th>' for name in head)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _percent(record: Record) -> str:
    """A share or a percentage with its interval."""
    by = 1.0 if record.unit == "%" else 100.0
    spread = f" <small>{by * record.p10:.1f}..{by * record.p90:.1f}</small>" if record.p10 != record.p90 else ""
    return f"{by * record.value:.1f}%{spread}"


def _quality(model: Model) -> str:
    if not model.quality:
        return ""
    whats = list(dict.fromkeys(what for found in model.quality.values() for what in found))
    rows = []
    for scheme, found in model.quality.items():
        cells = [f"<td>{safe(scheme)}</td>"]
        for what in whats:
            record = found.get(what)
            if record is None:
                cells.append("<td>-</td>")
            elif record.unit in ("%", "share"):
                cells.append(f"<td>{_percent(record)}</td>")
            else:
                cells.append(f"<td>{record.value:.4g} <small>{record.p10:.4g}..{record.p90:.4g}</small></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    one = next(iter(next(iter(model.quality.values())).values()))
    spread = safe(one.settings.get("spread", "p10 to p90"))
    head = ["scheme", *(what.replace("_", " ") for what in whats)]
    return f'<h3>Quality</h3>{_table(head, rows)}<p class="note">Small numbers: {spread}.</p>'


def _costs(model: Model) -> str:
    if not model.costs:
        return ""
    whats = [what for what in COSTS if any(what in found for found in model.costs.values())]
    rows = [
        f"<tr><td>{safe(variant)}</td>"
        + "".join(f"<td>{short(found[what].value)}</td>" if what in found else "<td>-</td>" for what in whats)
        + "</tr>"
        for variant, found in model.costs.items()
    ]
    return f"<h3>Before the first token</h3>{_table(['variant', *(COST_TITLES[what] for what in whats)], rows)}"


def _doubts(case: Case) -> str:
    found: dict[str, list[str]] = {}
    for row in case.rows:
        for what, record in row.records.items():
            for sentence in record.settings.get("disturbed", ()):
                if what != "throughput" or not str(sentence).startswith("throughput"):
                    found.setdefault(str(sentence), []).append(row.label)
    if not found:
        return ""
    items = ""
    for sentence, labels in found.items():
        some = list(dict.fromkeys(labels))
        who = f" ({', '.join(some)})"
        items += f"<li>{safe(sentence)}{'' if len(some) == len(case.rows) else safe(who)}</li>"
    return f'<div class="doubt">This run was disturbed:<ul>{items}</ul></div>'


def _machines(records: Sequence[Record]) -> str:
    found: dict[str, list[Record]] = {}
    for r in records:
        found.setdefault(machine_of(r), []).append(r)
    parts = ['<section id="machines"><h2>Machines</h2>']
    for machine, mine in found.items():
        reads = sorted(float(r.settings["bandwidth_gbps"]) for r in mine if "bandwidth_gbps" in r.settings)
        facts = [("torch", ", ".join(dict.fromkeys(r.machine.torch for r in mine)))]
        facts.append(("commits", ", ".join(dict.fromkeys(r.commit for r in mine))))
        if reads:
            facts.append(("read rate", f"{reads[0]:.1f} to {reads[-1]:.1f} GB/s over the runs"))
        rates = next((r.settings["rates"] for r in reversed(mine) if "rates" in r.settings), None)
        if rates:
            int8, bf16 = (2e-12 * max(rates[f"{kind}_macs"], rates[f"{kind}_tile_macs"]) for kind in ("int8", "bf16"))
            facts.append(("arithmetic peak", f"int8 {int8:.2f} TOPS, bf16 {bf16:.2f} TFLOPS"))
        facts.append(("records", str(len(mine))))
        items = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in facts)
        parts.append(f"<h3>{safe(machine)}</h3><dl>{items}</dl>")
    return "".join(parts) + "</section>"
