"""Draws docs/pipeline.svg, the picture in the README.

python docs/pipeline.py
"""

from __future__ import annotations

import pathlib

STEPS = [
    ("capture", "Dynamo's graph,", "before AOT"),
    ("canonicalize", "one spelling of linear,", "norm, silu, gelu, add"),
    ("merge_siblings", "q|k|v, gate|up:", "one linear an input"),
    ("fold_smoothing", "1/s into the norm or", "linear before it"),
    ("quantize_linears", "codes in place", "of weights"),
    ("fuse_norms", "RMSNorm, LayerNorm of", "one linear's input"),
    ("fuse_epilogues", "bias, activation, gate,", "multiply, residual"),
    ("keep_int8", "static to static:", "codes, not bf16"),
    ("lower", "generated > onednn", "> aten > reference"),
    ("share_embeddings", "a tied table is read", "from the head's codes"),
    ("fuse_rope", "rotation and the cache's", "writes: one native call"),
    ("chain_calls", "native calls in a row", "are one call"),
    ("Inductor", "everything else:", "sampling, masks, ..."),
]
WIDTH, HEIGHT, GAP = 158, 74, 22


def draw() -> str:
    total = len(STEPS) * (WIDTH + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} 190" font-family="system-ui, sans-serif" font-size="12" role="img">',
        "<title>The pipeline: capture, eleven passes, Inductor; packed weights in one store</title>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#888"/></marker></defs>',
    ]
    for index, (name, first, second) in enumerate(STEPS):
        x = GAP + index * (WIDTH + GAP)
        ours = 0 < index < len(STEPS) - 1
        fill, ink = ("#0b6e6e", "#ffffff") if ours else ("#e4e7eb", "#1f2933")
        parts.append(f'<rect x="{x}" y="20" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{fill}"/>')
        middle = x + WIDTH / 2
        parts.append(
            f'<text x="{middle}" y="44" text-anchor="middle" font-weight="600" font-size="14" fill="{ink}">{name}</text>'
        )
        for line, y in ((first, 64), (second, 80)):
            parts.append(
                f'<text x="{middle}" y="{y}" text-anchor="middle" fill="{ink}">{line.replace(">", "&gt;")}</text>'
            )
        if index:
            parts.append(f'<path d="M{x - GAP + 2} 57H{x - 3}" stroke="#888" stroke-width="2" marker-end="url(#a)"/>')
    names = [name for name, *_ in STEPS]
    lower = GAP + names.index("lower") * (WIDTH + GAP) + WIDTH / 2
    quantize = GAP + names.index("quantize_linears") * (WIDTH + GAP)
    parts += [
        f'<rect x="{quantize}" y="128" width="{2 * WIDTH + GAP}" height="44" rx="8" fill="none" stroke="#0b6e6e" stroke-width="2"/>',
        f'<text x="{quantize + WIDTH + GAP / 2}" y="147" text-anchor="middle" fill="#888" font-weight="600">store: each weight packed once,</text>',
        f'<text x="{quantize + WIDTH + GAP / 2}" y="163" text-anchor="middle" fill="#888">shared by prefill, decode and verification graphs</text>',
        f'<path d="M{quantize + WIDTH / 2} 94V126" stroke="#888" stroke-width="2" marker-end="url(#a)"/>',
        f'<path d="M{quantize + 2 * WIDTH + GAP} 150H{lower}V97" stroke="#888" stroke-width="2" fill="none" marker-end="url(#a)"/>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("pipeline.svg").write_text(draw())
