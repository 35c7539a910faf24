"""Pictures of measurements: where a step's time goes, and how far from the machine's limits each scheme is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpass.measure.profile import Profile
from qpass.measure.record import Record
from qpass.measure.report_svg import short

INK, PAPER, GRID = "#22272e", "#ffffff", "#d5dae1"
COLOURS = ("#2f6db5", "#d1691b", "#3a8f5c", "#a13d63", "#7a6bb0", "#6b7785", "#b59b2f")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.savefig(
        path, facecolor=PAPER, bbox_inches="tight", dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None
    )
    _pyplot().close(figure)


def draw_profile(profile: Profile, title: str, path: Path) -> None:
    """One bar of a decode step in its parts, and one of its linears by shape. The suffix of ``path`` says which format."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 3.6), sharex=True, gridspec_kw={"hspace": 0.55})
    for axis, parts, name in (
        (axes[0], profile.parts, "one step, milliseconds"),
        (axes[1], profile.linears, "its linears by shape (inputs, packed weight), milliseconds"),
    ):
        left = 0.0
        for index, part in enumerate(parts):
            axis.barh(
                0,
                part.ms,
                left=left,
                color=COLOURS[index % len(COLOURS)],
                height=0.6,
                label=f"{part.name}: {part.ms:.1f} ms",
            )
            if part.share(profile.step_ms) > 0.06:
                axis.text(
                    left + part.ms / 2,
                    0,
                    f"{part.share(profile.step_ms):.0%}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=9,
                )
            left += part.ms
        axis.set_yticks([])
        axis.set_title(name, loc="left", fontsize=10, color=INK)
        axis.legend(
            ncols=4,
            loc="upper left",
            bbox_to_anchor=(0, -0.28 if axis is axes[1] else -0.05),
            frameon=False,
            fontsize=8,
        )
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    figure.suptitle(title, x=0.125, ha="left", fontsize=11, color=INK)
    _save(figure, path)


def draw_roofline(
    lines: Mapping[str, Sequence[tuple[int, float, float]]], title: str, path: Path, peers: Sequence[str] = ()
) -> None:
    """Shares of the limits against M, a line a scheme; ``lines``: name -> (M, share of bandwidth, share of peak).

    Left: weight bytes a second over what the memory gives. Right: multiply-accumulates a second over the peak of the
    instruction that the scheme uses. ``peers`` are drawn dashed.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, gridspec_kw={"wspace": 0.06})
    for index, (name, points) in enumerate(lines.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "lw": 1.8, "marker": "o", "ms": 3.5}
        if name in peers:
            style |= {"ls": "--", "lw": 1.2}
        for axis, which in zip(axes, (1, 2), strict=True):
            axis.plot([p[0] for p in points], [100 * p[which] for p in points], label=name, **style)
    for axis, name in zip(axes, ("share of the memory's read bandwidth", "share of the arithmetic peak"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("M, tokens at once", color=INK)
        axis.set_title(name, loc="left", fontsize=10, color=INK)
        axis.grid(color=GRID, lw=0.6)
        axis.set_ylim(0, 112)
        axis.axhline(100, color=INK, lw=0.8)
        ticks = sorted({p[0] for points in lines.values() for p in points})
        axis.set_xticks(ticks, [str(m) for m in ticks], fontsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("%", color=INK)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    figure.suptitle(title, x=0.125, y=1.0, ha="left", fontsize=11, color=INK)
    _save(figure, path)


def draw_times(times: Mapping[str, Sequence[tuple[str, Record]]], title: str, path: Path) -> None:
    """Bars a variant for "tpot" and "ttft": the median, p10 to p90 as a thin line, the machine's limit as a red mark."""
    names = {"tpot": "milliseconds a token (TPOT)", "ttft": "milliseconds to the first token (TTFT)"}
    drawn = {what: rows for what, rows in times.items() if rows}
    pyplot = _pyplot()
    most = max(map(len, drawn.values()))
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(11, 0.9 + 0.42 * most), squeeze=False)
    for axis, (what, rows) in zip(axes[0], drawn.items(), strict=True):
        for place, (name, record) in enumerate(rows):
            axis.barh(
                place,
                record.value,
                height=0.6,
                color=COLOURS[5 if record is rows[0][1] or record.settings.get("peer") else 0],
            )
            axis.plot([record.p10, record.p90], [place, place], color=INK, lw=1.2)
            if record.share_of_limit is not None:
                limit = record.value * record.share_of_limit
                axis.plot([limit, limit], [place - 0.38, place + 0.38], color="#b3261e", lw=2)
            axis.text(
                max(record.value, record.p90),
                place,
                f"  {name}  {short(record.value)}",
                va="center",
                fontsize=8.5,
                color=INK,
            )
        axis.set_xlim(0, 1.75 * max(r.p90 for _, r in rows))
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_yticks([])
        axis.set_title(names.get(what, what), loc="left", fontsize=10, color=INK)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    figure.suptitle(title, x=0.125, y=1.02, ha="left", fontsize=11, color=INK)
    _save(figure, path)
