"""What the passes must find in each family's two layers, and why: the numbers follow from the architecture."""

from __future__ import annotations

from dataclasses import dataclass, field

LAYERS = 2


@dataclass(frozen=True)
class Expected:
    """Numbers of one layer, and what stands outside the layers.

    ``linears`` counts the linears over a matrix; ``merged`` the groups that become one, by their size; ``fused`` how
    many linears take each part. ``outside`` are the linears beside the layers (heads), ``left`` names the Parameters
    per layer that are no matrix and stay as they are.
    """

    linears: int
    merged: tuple[int, ...] = ()
    fused: dict[str, int] = field(default_factory=dict)
    biases: int = 0  # merged linears count once
    outside: tuple[str, ...] = ("lm_head",)
    outside_biases: int = 0
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
        return parts | ({"bias": biases} if biases else {})


# q, k, v in one; gate and up in one, which ends in act(gate) * up; o_proj and down_proj end in the residual stream.
GATED = Expected(linears=7, merged=(3, 2), fused={"silu": 1, "glu": 1, "residual": 2})

EXPECTED: dict[str, Expected] = {
    "llama": GATED,
    "llama_awkward": GATED,
    "mistral": GATED,
    # As Llama, with biases on q, k and v.
    "qwen2": Expected(linears=7, merged=(3, 2), fused={"silu": 1, "glu": 1, "residual": 2}, biases=1),
    # The norms of q and k come behind the merged linear.
    "qwen3": GATED,
    # A norm stands between o_proj or down_proj and the residual stream: no linear ends in it.
    "gemma3": Expected(linears=7, merged=(3, 2), fused={"gelu_tanh": 1, "glu": 1}),
    # qkv_proj and gate_up_proj are single matrices already; the halves of the latter are gate and up.
    "phi3": Expected(linears=4, fused={"silu": 1, "glu": 1, "residual": 2}),
    # c_attn, c_proj, c_fc with the tanh gelu written out, c_proj; all with biases.
    "gpt2": Expected(linears=4, fused={"gelu_tanh": 1, "residual": 2}, biases=4),
    "gpt_bigcode": Expected(linears=4, fused={"gelu_tanh": 1, "residual": 2}, biases=4),
    # q, k, v apart; no gate.
    "starcoder2": Expected(linears=6, merged=(3,), fused={"gelu_tanh": 1, "residual": 2}, biases=4),
    "opt": Expected(linears=6, merged=(3,), fused={"relu": 1, "residual": 2}, biases=4),
    # Attention and MLP read one norm: h_to_4h keeps its gelu and stays out of qkv. 4h_to_h takes the addition of the
    # attention's output; the addition of the residual stream, behind that one, stays outside.
    "falcon": Expected(linears=4, fused={"gelu": 1, "residual": 1}),
    # Falcon-RW is sequential; its biases are added behind a product with the transposed weight.
    "falcon_rw": Expected(linears=4, fused={"gelu": 1, "residual": 2}, biases=4),
    "bloom": Expected(linears=4, fused={"gelu_tanh": 1, "residual": 2}, biases=4),
    # As Falcon, but with a norm for the MLP and biases.
    "gpt_neox": Expected(linears=4, fused={"gelu": 1, "residual": 1}, biases=4),
    # As Falcon, with q, k, v apart; only fc_in, fc_out and the head have biases.
    "gptj": Expected(linears=6, merged=(3,), fused={"gelu_tanh": 1, "residual": 1}, biases=2, outside_biases=1),
    # The residual comes before the norm. The pooler's tanh is no activation of the vocabulary.
    "bert": Expected(
        linears=6,
        merged=(3,),
        fused={"gelu": 1, "residual": 2},
        biases=4,
        outside=("bert.pooler.dense", "classifier"),
        outside_biases=2,
    ),
    # The patch embedding is a convolution.
    "vit": Expected(
        linears=6,
        merged=(3,),
        fused={"gelu": 1, "residual": 2},
        biases=4,
        outside=("classifier",),
        outside_biases=1,
    ),
    # Attention and the router are matrices, the experts are not; what they give reaches the residual stream by a sum.
    "mixtral": Expected(
        linears=5, merged=(3,), fused={"residual": 1}, left=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    ),
    "qwen3_moe": Expected(
        linears=5, merged=(3,), fused={"residual": 1}, left=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    ),
}
