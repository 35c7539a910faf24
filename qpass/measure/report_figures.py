"""The report's figures, each from its Records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpass.measure.record import Record
from qpass.measure.report_data import Case, Model, linear_shares
from qpass.measure.report_svg import Axis, Bar, Line, Point, bars, chart, legend, nice_ticks, safe, short, stacked

TITLES = {"tpot": "Time a token (TPOT), ms", "ttft": "Time to the first token (TTFT), ms"}
PEERS = ("bf16", "bf16-onednn", "bf16-inductor", "int8-onednn", "int4pack-g128", "int8pack")


def times(case: Case, what: str) -> str:
    """A bar a variant: median, p10 to p90, the machine's limit as a mark."""
    rows = []
    for row in case.rows:
        record = row.records.get(what)
        if record is None:
            continue
        share, gain = record.share_of_limit, row.speed_up(what)
        limit = None if share is None else share * record.value
        own = "tokens_a_step" in record.settings and what == "tpot"
        title = (
            f"{row.label}: {short(record.value)} ms, p10 {short(record.p10)}, p90 {short(record.p90)}, n = {record.n}"
        )
        if limit is not None:
            title += f"; {'its own bound' if own else 'the limit'} {short(limit)} ms ({share:.0%})"
        text = short(record.value) + (f"  ({gain:.2f}x)" if gain and row.over is not row else "")
        colour = 5 if row.over is row or row.peer else 0
        rows.append(Bar(row.label, record.value, text, title, record.p10, record.p90, limit, row.peer, colour))
    if not rows:
        return ""
    alt = f"{TITLES[what]}: " + "; ".join(f"{r.label} {r.text}" for r in rows)
    note = "Thin lines: p10 to p90. Red marks: the least that the machine allows." if any(r.limit for r in rows) else ""
    return f'<figure><figcaption>{TITLES[what]}</figcaption>{bars(rows, alt)}<p class="note">{note}</p></figure>'


def verification(model: Model) -> str:
    """What checking K tokens costs over a plain step, a line a scheme."""
    if not model.verify:
        return ""
    lines, words = [], []
    for i, (scheme, runs) in enumerate(model.verify.items()):
        points = [
            Point(
                r.settings["k"],
                r.value / r.settings["plain_ms"],
                f"{scheme}: checking {r.settings['k']} tokens takes {short(r.value)} ms, {r.value / r.settings['plain_ms']:.2f} plain steps",
            )
            for r in runs
        ]
        lines.append(Line(scheme, points, i))
        words.append(f"{scheme} " + ", ".join(f"K={p.x:g} {p.y:.2f}" for p in points))
    most = max(p.y for line in lines for p in line.points)
    ks = sorted({int(p.x) for line in lines for p in line.points})
    x = Axis("K, drafted tokens that are checked at once", ks[0], ks[-1], [k for k in ks if k not in (3, 5, 7)])
    ticks = nice_ticks(0.0, max(2.0, most))
    alt = "Cost of checking K tokens over a plain step: " + "; ".join(words)
    drawn = chart(lines, x, Axis("", 0.0, ticks[-1], ticks), alt, reference=1.0)
    context = next(iter(model.verify.values()))[0].settings.get("context", "?")
    keys = legend([(line.name, line.colour, False) for line in lines])
    return (
        f"<figure><figcaption>Checking K drafted tokens, in plain steps</figcaption>{drawn}{keys}"
        f'<p class="note">At {safe(context)} tokens of context, everything included.</p></figure>'
    )


def pareto(model: Model) -> str:
    """Quality against the bytes that a step reads: perplexity if there is one, else KL divergence."""
    sizes: dict[str, float] = {}
    for case in reversed(model.cases):
        if case.batch == 1:
            sizes |= {row.scheme: row.megabytes for row in case.rows if row.megabytes and row.variant == row.scheme}
    for what, title in (("perplexity", "Perplexity"), ("kl", "KL divergence from bf16, nats")):
        points = []
        for scheme, found in model.quality.items():
            if what in found and scheme in sizes:
                value = found[what].value
                title_ = f"{scheme}: {what} {value:.4g} at {sizes[scheme]:.0f} MB read a step"
                points.append(Point(sizes[scheme], value, title_, scheme))
        if len(points) < 2:
            continue
        low, high = min(p.y for p in points), max(p.y for p in points)
        y_ticks = nice_ticks(low, high if high > low else low * 1.1 + 0.01)
        x_ticks = nice_ticks(0.0, max(p.x for p in points))
        x = Axis("MB read a step", 0.0, x_ticks[-1], x_ticks)
        lines = [Line(p.label, [p], i) for i, p in enumerate(points)]
        alt = f"{title} against bytes: " + "; ".join(p.title for p in points)
        drawn = chart(lines, x, Axis("", y_ticks[0], y_ticks[-1], y_ticks), alt, joined=False)
        return (
            f"<figure><figcaption>{title} against bytes</figcaption>{drawn}"
            '<p class="note">Lower and further left is better.</p></figure>'
        )
    return ""


def roofline(machine: str, n: int, k: int, names: Mapping[str, Sequence[Record]]) -> str:
    """Shares of the two limits against the number of tokens, a line a candidate."""
    drawn = []
    ours = [name for name in names if name not in PEERS]
    order = [*ours, *(name for name in names if name in PEERS)]
    tokens = sorted({r.settings["m"] for runs in names.values() for r in runs})
    ticks = [
        m
        for i, m in enumerate(tokens)
        if m in (1, 4, 16, 64, 256, 512, 2048) or len(tokens) < 6 or i == len(tokens) - 1
    ]
    for which, title in enumerate(("Share of the memory\u2019s read rate", "Share of the arithmetic peak")):
        lines = []
        for i, name in enumerate(order):
            points = [
                Point(
                    r.settings["m"],
                    share,
                    f"{name}, {r.settings['m']} tokens: {short(r.value)} ms, {share:.0%} of the limit",
                )
                for r in names[name]
                for share in (linear_shares(r)[which],)
            ]
            lines.append(Line(name, points, i, name in PEERS))
        alt = f"{title} of a linear layer {k} to {n}: " + "; ".join(
            f"{line.name} at most {max(p.y for p in line.points):.0%}" for line in lines
        )
        x = Axis("tokens at once", tokens[0], max(tokens[-1], tokens[0] + 1), ticks, log=True)
        figure = chart(lines, x, Axis("", 0.0, 1.1, [0, 0.25, 0.5, 0.75, 1.0], percent=True), alt, reference=1.0)
        drawn.append(f"<figure><figcaption>{title}</figcaption>{figure}</figure>")
    keys = legend([(name, i, name in PEERS) for i, name in enumerate(order)])
    return f'<h3>{k} inputs to {n} outputs, {safe(machine)}</h3><div class="figures">{"".join(drawn)}</div>{keys}'


def profile(record: Record) -> str:
    """Where one decode step's time goes: its parts, and its linears by shape."""
    s, drawn = record.settings, []
    for name, parts in (("One step in its parts", s["parts"]), ("Its linears by shape", s["linears"])):
        total = sum(part["ms"] for part in parts)
        if not total:
            continue
        sized = [
            (
                part["name"],
                float(part["ms"]),
                f"{part['name']}: {short(part['ms'])} ms ({part['ms'] / record.value:.1%})",
            )
            for part in parts
        ]
        alt = f"{name}: " + "; ".join(title for *_, title in sized)
        keys = legend([(f"{label} {short(ms)} ms", i, False) for i, (label, ms, _) in enumerate(sized)])
        drawn.append(f"<figure><figcaption>{name}, {short(total)} ms</figcaption>{stacked(sized, alt)}{keys}</figure>")
    where = f"{s.get('scheme', '')} at {s.get('context', '?')} tokens of context"
    return f'<h3>Where a token\u2019s time goes: {safe(where)}</h3><div class="figures">{"".join(drawn)}</div>'
