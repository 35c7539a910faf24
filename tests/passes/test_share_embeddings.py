"""share_embeddings: a table tied to the head is read from the head's packed weight; every other one stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qpass.algorithms.rtn import rtn
from qpass.cpu import detect
from qpass.kernels.plan import SERVED
from qpass.passes import PIPELINE, run_pipeline
from qpass.scheme import Scheme
from tests.support.capture import Body, capture, context, rewrite
from tests.support.tiny_models import build, inputs
from tests.support.tolerance import sqnr_db

PACKED = torch.ops.qpass.packed_embedding.default
IDS = torch.randint(0, 96, (2, 7))

pytestmark = pytest.mark.skipif(detect().tier not in SERVED, reason="needs AVX2")


def tied(body=lambda m, ids: m.head(m.embed(ids)), *, embed=None, dtype=torch.float32):
    embed = embed or nn.Embedding(96, 64)
    head = nn.Linear(64, 96, bias=False)
    head.weight = embed.weight
    return Body(body, embed=embed, head=head).to(dtype)


def shared(module, scheme="w8a16", ids=IDS, **options):
    return rewrite(module, (ids,), PIPELINE, scheme, materialize=False, **options)


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dynamic", "w8a16-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tied(scheme, dtype):
    module = tied(lambda m, ids: (m.embed(ids), m.head(m.embed(ids) * 8.0)), dtype=dtype)
    done = shared(module, scheme)
    assert done.counts["share_embeddings"] == 2
    assert not done.nodes(F.embedding)
    rows, logits = done.outputs()
    table = rtn(module.embed.weight.detach().float(), Scheme.parse(scheme).weight).dequantize()
    assert torch.equal(rows, F.embedding(IDS, table).to(dtype))
    assert logits.shape == (2, 7, 96)


def test_both_read_one_packed_weight_and_nobody_the_table():
    done = shared(tied())
    (embedding,) = done.nodes(PACKED)
    (head,) = done.nodes(torch.ops.qpass.packed_linear.default)
    assert embedding.args[1].target == head.args[1].target
    (table,) = [n for n in done.gm.graph.find_nodes(op="placeholder") if n.name in done.capture.parameters]
    assert not table.users
    assert done.ctx.weights.packed_count == 1


def test_the_record():
    done = shared(tied())
    head, embedding = done.ctx.records
    assert (embedding.name, embedding.scheme, embedding.lowering) == ("embed", "w8a16", "generated")
    assert embedding.notes == ("shares the table of head",)
    assert (embedding.n, embedding.k) == (head.n, head.k) == (96, 64)
    assert embedding.bytes_before == embedding.bytes_after == 0  # they are the head's


def test_padding_makes_no_difference():
    assert shared(tied(embed=nn.Embedding(96, 64, padding_idx=0))).counts["share_embeddings"] == 1


def _untied(m, ids):
    return m.other(m.embed(ids))


TWINS = {
    "another linear's weight": lambda: Body(_untied, embed=nn.Embedding(96, 64), other=nn.Linear(64, 96)),
    "no head in the graph": lambda: tied(lambda m, ids: m.embed(ids)),
    "the head reads something else": lambda: tied(lambda m, ids: m.embed(ids) + F.linear(m.embed(ids), m.square)),
    "a copy of the table": lambda: tied(lambda m, ids: m.head(F.embedding(ids, m.embed.weight * 1.0))),
    "a table that calls rescale": lambda: tied(embed=nn.Embedding(96, 64, max_norm=1.0)),
    "sparse": lambda: tied(embed=nn.Embedding(96, 64, sparse=True)),
    "a sum of rows": lambda: tied(lambda m, ids: m.head(F.embedding_bag(ids, m.embed.weight))),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins(name):
    module = TWINS[name]()
    module.square = nn.Parameter(torch.randn(64, 64))
    assert shared(module).counts["share_embeddings"] == 0


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("w16a16", {}),
        ("w4a16-g32", {}),  # an embedding of four bits is not what a head of four bits asks for
        ("w8a16", {"lowering": "aten"}),
        ("w8a16", {"lowering": "reference"}),
    ],
)
def test_heads_that_share_nothing(scheme, options):
    done = shared(tied(dtype=torch.bfloat16), scheme, **options)
    assert done.counts["share_embeddings"] == 0
    assert len(done.nodes(F.embedding)) == 1


def test_a_head_that_was_merged_with_a_sibling():
    module = tied(lambda m, ids: (lambda x: (m.head(x), m.second(x)))(m.embed(ids)))
    module.second = nn.Linear(64, 96, bias=False)
    assert shared(module).counts["share_embeddings"] == 0


@pytest.mark.parametrize("family", ["qwen2", "llama_awkward", "gemma3", "gpt2", "opt", "bloom"])
def test_families(family):
    """Those that tie them; eight bits a row change little."""
    model = build(family, torch.float32)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    captured = capture(model, **inputs(family, torch.float32))
    gm, counts = run_pipeline(captured.gm, context(captured, "w8a16", materialize=False))
    assert counts["share_embeddings"] == 1
    assert sqnr_db(captured.run()[-1], captured.run(gm)[-1]) > 25  # all of the model's weights have eight bits


def test_an_id_out_of_range():
    captured = capture(tied(), IDS)
    gm, _ = run_pipeline(captured.gm, context(captured, "w8a16", materialize=False))
    captured.inputs = [torch.full_like(v, 96) if v is IDS else v for v in captured.inputs]
    with pytest.raises((RuntimeError, IndexError), match="index out of range: id 96, the table has 96 rows"):
        captured.run(gm)
