"""``qpass kernels``: for each distinct linear of a model, how its kernel walks it, the model's time, the clock's, and the limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qpass.frontends.commands import session

MOST_TOKENS = 65536


def kernels(model: str, *, scheme: str, exclude: Sequence[str], tokens: Sequence[int]) -> None:
    """The table goes to stdout. Raises QpassError."""
    session.check(model, scheme)
    import torch

    from qpass.errors import OptionError
    from qpass.frontends import progress
    from qpass.frontends.explain import numberless
    from qpass.frontends.sites import sites_of
    from qpass.kernels.load import tuning_of
    from qpass.kernels.plan import Shape, predict
    from qpass.kernels.rates import measured_cpu
    from qpass.measure.linear import candidate, format_of, interleaved
    from qpass.scheme import Scheme

    for m in tokens:
        if not 1 <= m <= MOST_TOKENS:
            raise OptionError(f"--tokens {m}: accepted are 1 to {MOST_TOKENS}")
    cpu = measured_cpu()
    assert cpu.rates is not None
    with progress.waiting(f"tracing {Path(model).name}"):
        sites = sites_of(model, scheme, exclude)
    found: dict[tuple[str, int, int, str], int] = {}
    for site in sites:
        key = (numberless(site.name), site.n, site.k, site.scheme.name)
        found[key] = found.get(key, 0) + 1
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    table = Table(title=f"{Path(model).name}, {cpu.name}, tier {cpu.tier}", title_justify="left")
    columns = ("linear", "count", "N x K", "scheme", "M", "path", "limit", "model ms", "measured ms", "off", "share")
    for column in columns:
        text = column in ("linear", "scheme", "path", "limit")
        table.add_column(column, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    with torch.no_grad():
        for (name, n, k, scheme_name), count in found.items():
            format = format_of(Scheme.parse(scheme_name))
            kernel = candidate(scheme_name, n, k)
            for m in tokens:
                x = torch.randn(m, k).to(torch.bfloat16)
                kernel.call(x, 0)
                path = tuning_of(format).path(format, cpu.tier, m)
                planned = predict(Shape(m, n, k), format, cpu, path)
                measured = interleaved({"kernel": kernel}, x, rounds=5, budget_s=1.0)["kernel"]
                share = planned.limit_seconds / measured
                first = m == tokens[0]
                table.add_row(
                    name if first else "",
                    str(count) if first else "",
                    f"{n} x {k}" if first else "",
                    scheme_name if first else "",
                    str(m),
                    f"{path} x{planned.tile_rows}",
                    planned.bound,
                    f"{1e3 * planned.seconds:.3f}",
                    f"{1e3 * measured:.3f}",
                    f"{planned.seconds / measured - 1:+.0%}",
                    f"{share:.0%}",
                )
    console.print(table)
    rates = cpu.rates
    console.print(
        f"limits: memory {rates.read_bytes / 1e9:.1f} GB/s, int8 {2 * max(rates.int8_macs, rates.int8_tile_macs) / 1e12:.2f} TOPS, "
        f"bf16 {2 * max(rates.bf16_macs, rates.bf16_tile_macs) / 1e12:.2f} TFLOPS, measured just before",
        soft_wrap=True,
    )
