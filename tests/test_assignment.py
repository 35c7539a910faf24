"""Who gets which scheme."""

from __future__ import annotations

import pytest

from qpass.assignment import Assignment
from qpass.errors import OptionError, SchemeError


def test_the_default_is_near_lossless() -> None:
    assert Assignment.make(None)("model.layers.0.mlp.up_proj").name == "w8a16"


def test_heads_and_routers_keep_eight_bits() -> None:
    chosen = Assignment.make("w4a16-g128")
    assert chosen("model.layers.0.mlp.up_proj").name == "w4a16-g128"
    assert chosen("lm_head").name == "w8a16"
    assert chosen("gpt_neox.embed_out").name == "w8a16"
    assert chosen("model.layers.3.mlp.gate").name == "w8a16"
    assert chosen("model.layers.3.mlp.gate_proj").name == "w4a16-g128"
    assert chosen("decoder", tied=True).name == "w8a16"
    assert Assignment.make("w8a8-dynamic")("lm_head").name == "w8a16"
    assert Assignment.make("w8a16-asym")("lm_head").name == "w8a16-asym"
    assert Assignment.make("w16a16")("lm_head").name == "w16a16"


def test_patterns_first_match_wins_and_may_name_the_head() -> None:
    chosen = Assignment.make({"*.mlp.*": "w4a16-g64", "*.down_proj": "w8a16", "lm_head": "w4a16-g32", "*": "w4a8-g32"})
    assert chosen("layers.0.mlp.down_proj").name == "w4a16-g64"
    assert chosen("layers.0.self_attn.q_proj").name == "w4a8-g32"
    assert chosen("lm_head").name == "w4a16-g32"


def test_without_a_star_the_others_get_the_default() -> None:
    assert Assignment.make({"*.mlp.*": "w4a16-g64"})("layers.0.self_attn.q_proj").name == "w8a16"


def test_function() -> None:
    chosen = Assignment.make(lambda name: "w4a16-g64" if "mlp" in name else None)
    assert chosen("a.mlp.b").name == "w4a16-g64"
    assert chosen("a.attn.b").name == "w8a16"
    with pytest.raises(SchemeError, match="w3"):
        Assignment.make(lambda name: "w3")("x")


def test_exclude_beats_all() -> None:
    assert Assignment.make({"lm_head": "w4a16-g32"}, exclude="lm_head")("lm_head").name == "w16a16"


def test_a_pattern_that_matches_nothing() -> None:
    chosen = Assignment.make({"*.mpl.*": "w4a16-g64"}, exclude=["lm_head"])
    with pytest.raises(OptionError, match=r"'\*\.mpl\.\*' matches none .*: a\.mlp\.b, lm_head"):
        chosen.check(["lm_head", "a.mlp.b"])
    with pytest.raises(OptionError, match="'lm_head' matches none"):
        chosen.check(["a.mpl.b"])
    chosen.check(["lm_head", "a.mpl.b"])


def test_what_is_no_choice() -> None:
    with pytest.raises(SchemeError, match="float"):
        Assignment.make(1.5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="3"):
        Assignment.make({3: "w8a16"})  # type: ignore[dict-item]
    with pytest.raises(OptionError, match="exclude"):
        Assignment.make(None, exclude=[3])  # type: ignore[list-item]
