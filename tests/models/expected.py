"""What the passes must find in each family's two layers, and why: the numbers follow from the architecture."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

LAYERS = 2


@dataclass(frozen=True)
class Expected:
    """Numbers of one layer, and what stands outside the layers.

    ``linears`` counts the linears over a matrix; ``merged`` the groups that become one, by their size; ``fused`` how
    many linears take each part, norms first. ``outside`` are the linears beside the layers (heads), ``left`` names the Parameters
    per layer that are no matrix and stay as they are.
    """

    linears: int
    merged: tuple[int, ...] = ()
    fused: dict[str, int] = field(default_factory=dict)
    biases: int = 0  # merged linears count once
    outside: tuple[str, ...] = ("lm_head",)
    outside_biases: int = 0
    outside_norm: str | None = None  # of the head, which reads the last norm alone
    left: tuple[str, ...] = ()

    @property
    def sites(self) -> int:
        """Linears after merging, in the whole model."""
        return LAYERS * (self.linears - sum(self.merged) + len(self.merged)) + len(self.outside)

    @property
    def all_linears(self) -> int:
        return LAYERS * self.linears + len(self.outside)

    @property
    def merges(self) -> int:
        return LAYERS * len(self.merged)

    @property
    def fused_parts(self) -> dict[str, int]:
        parts = {part: LAYERS * count for part, count in self.fused.items()}
        biases = LAYERS * self.biases + self.outside_biases
        if self.outside_norm:
            parts[self.outside_norm] = parts.get(self.outside_norm, 0) + 1
        return parts | ({"bias": biases} if biases else {})


RMS, LAYER = {"rms_norm": 2}, {"layer_norm": 2}
"""One norm in front of attention and one in front of the MLP, each read by one (merged) linear alone."""

# q, k, v in one; gate and up in one, which ends in act(gate) * up; o_proj and down_proj end in the residual stream.
GATED = Expected(linears=7, merged=(3, 2), fused=RMS | {"silu": 1, "glu": 1, "residual": 2}, outside_norm="rms_norm")

# c_attn, c_proj, c_fc with the tanh gelu written out, c_proj; all with biases.
SEQUENTIAL = Expected(linears=4, fused=LAYER | {"gelu_tanh": 1, "residual": 2}, biases=4, outside_norm="layer_norm")

EXPECTED: dict[str, Expected] = {
    "llama": GATED,
    "llama_awkward": GATED,
    "mistral": GATED,
    # As Llama, with biases on q, k and v.
    "qwen2": replace(GATED, biases=1),
    # The norms of q and k come behind the merged linear.
    "qwen3": GATED,
    # A norm stands between o_proj or down_proj and the residual stream: no linear ends in it.
    "gemma3": replace(GATED, fused=RMS | {"gelu_tanh": 1, "glu": 1}),
    # qkv_proj and gate_up_proj are single matrices already; the halves of the latter are gate and up.
    "phi3": replace(GATED, linears=4, merged=()),
    "gpt2": SEQUENTIAL,
    "gpt_bigcode": SEQUENTIAL,
    # q, k, v apart; no gate.
    "starcoder2": replace(SEQUENTIAL, linears=6, merged=(3,)),
    "opt": replace(SEQUENTIAL, linears=6, merged=(3,), fused=LAYER | {"relu": 1, "residual": 2}),
    # Attention and MLP read one norm: h_to_4h keeps its gelu and stays out of qkv. 4h_to_h takes the addition of the
    # attention's output; the addition of the residual stream, behind that one, stays outside.
    "falcon": Expected(linears=4, fused={"gelu": 1, "residual": 1}, outside_norm="layer_norm"),
    # Falcon-RW is sequential; its biases are added behind a product with the transposed weight.
    "falcon_rw": replace(SEQUENTIAL, fused=LAYER | {"gelu": 1, "residual": 2}),
    "bloom": SEQUENTIAL,
    # As Falcon, but with a norm for the MLP alone, and biases.
    "gpt_neox": replace(SEQUENTIAL, fused=LAYER | {"gelu": 1, "residual": 1}),
    # As Falcon, with q, k, v apart; only fc_in, fc_out and the head have biases.
    "gptj": Expected(
        linears=6,
        merged=(3,),
        fused={"gelu_tanh": 1, "residual": 1},
        biases=2,
        outside_biases=1,
        outside_norm="layer_norm",
    ),
    # The residual comes before the norm, and reads it beside the next linear. The pooler's tanh is no activation of the vocabulary.
    "bert": Expected(
        linears=6,
        merged=(3,),
        fused={"gelu": 1, "residual": 2},
        biases=4,
        outside=("bert.pooler.dense", "classifier"),
        outside_biases=2,
    ),
    # The patch embedding is a convolution; the head reads one token of the last norm.
    "vit": Expected(
        linears=6,
        merged=(3,),
        fused=LAYER | {"gelu": 1, "residual": 2},
        biases=4,
        outside=("classifier",),
        outside_biases=1,
    ),
    # Attention and the router are matrices, the experts are not; what they give reaches the residual stream by a sum. Router
    # and experts read one norm.
    "mixtral": Expected(
        linears=5,
        merged=(3,),
        fused={"rms_norm": 1, "residual": 1},
        left=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        outside_norm="rms_norm",
    ),
    "qwen3_moe": Expected(
        linears=5,
        merged=(3,),
        fused={"rms_norm": 1, "residual": 1},
        left=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        outside_norm="rms_norm",
    ),
}
