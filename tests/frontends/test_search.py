"""search: measured sensitivities, a choice within the budget, the same one twice, resumable, readable."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import CheckpointError, OptionError
from qpass.frontends.options import Options
from qpass.frontends.recipe import Choice, Recipe
from qpass.frontends.search import Budget, Option, _hull, _path, _within_bytes, search
from qpass.frontends.simulate import Simulation, divergence, logits_of
from qpass.passes import canonicalize, fold_smoothing, merge_siblings, quantize_linears
from qpass.scheme import Scheme
from tests.support.capture import rewrite
from tests.support.tolerance import sqnr_db

CANDIDATES = ("w16a16", "w8a16", "w4a16-g32", "w2a16-g32")
X = [torch.randn(32, 512, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


class Net(nn.Module):
    """Three layers, of which the first matters a hundred times more than the last's hidden half."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet, self.head = nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 256)
        with torch.no_grad():
            self.head.weight.mul_(4)

    def forward(self, x):
        return self.head(self.loud(x) + 0.01 * self.quiet(x.sin()))


@pytest.fixture(scope="module")
def net():
    return Net().eval()


@pytest.fixture(scope="module")
def recipe(net):
    return search(net, X, "bytes<=15%", candidates=CANDIDATES)


def test_bytes_go_where_they_count(net, recipe):
    schemes = recipe.schemes
    bits = {name: schemes[name].weight.bits for name in ("loud", "quiet", "head")}
    assert bits["quiet"] == 2
    assert bits["loud"] > 2
    full = 4 * sum(p.numel() for p in net.parameters() if p.dim() == 2)
    assert recipe.bytes <= 0.15 * full
    assert schemes["*"].name == "w16a16"


def test_it_beats_the_uniform_scheme_of_its_size(net, recipe):
    simulation = Simulation(net)
    reference = [simulation(x) for x in X]

    def kl(schemes):
        simulation.schemes = schemes
        return sum(divergence(r, simulation(x)) for r, x in zip(reference, X, strict=True))

    names = ("loud", "quiet", "head")
    own = kl({n: s for n, s in recipe.schemes.items() if n != "*"})
    smaller = search(net, X, "bytes<=100%", candidates=("w4a16-g32",))
    assert recipe.bytes <= 1.02 * smaller.bytes
    assert own < kl(dict.fromkeys(names, Scheme.parse("w4a16-g32")))


def test_perplexity_stays_within_and_time_is_saved(net):
    tight, loose = (search(net, X, f"ppl<={share}%", candidates=CANDIDATES) for share in (0.05, 5))
    assert math.expm1(tight.summary["KL together"]) <= 0.0005
    assert math.expm1(loose.summary["KL together"]) <= 0.05
    assert loose.summary["us a token"] < tight.summary["us a token"]


@pytest.fixture
def measured(monkeypatch):
    """Counts what is measured; stops at the ninth where ``stop`` is in it."""
    from qpass.frontends import search as module

    calls, own = [], module.divergence

    def counting(*args):
        if "stop" in calls and len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(1)
        return own(*args)

    monkeypatch.setattr(module, "divergence", counting)
    return calls


def test_the_same_twice_and_resumed(net, recipe, measured, tmp_path):
    first = search(net, X, "bytes<=15%", candidates=CANDIDATES, resume=tmp_path / "notes")
    assert len(measured) == len(X) * (3 * 3 + 1)
    second = search(net, X, "bytes<=15%", candidates=CANDIDATES, resume=tmp_path / "notes")
    assert first == second == recipe
    assert len(measured) == len(X) * (3 * 3 + 1)  # nothing anew
    with pytest.raises(OptionError, match="other batches"):
        search(net, X[:1], "bytes<=15%", candidates=CANDIDATES, resume=tmp_path / "notes")


def test_an_interrupted_search_keeps_what_it_measured(net, measured, tmp_path):
    measured.append("stop")
    with pytest.raises(KeyboardInterrupt):
        search(net, X, "bytes<=15%", candidates=CANDIDATES, resume=tmp_path / "notes")
    assert len(json.loads((tmp_path / "notes").read_text())["kl"]) == 2


def test_a_file_that_people_read(recipe, tmp_path):
    recipe.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == recipe
    text = recipe.explain()
    assert "budget: bytes<=15%" in text
    assert "loud" in text
    assert "would cost" in text
    (tmp_path / "bad.json").write_text('{"format": "qpass recipe 1", "choices": [{}], "summary": {}}')
    with pytest.raises(CheckpointError, match="damaged recipe"):
        Recipe.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a recipe"):
        Recipe.load(tmp_path / "bad.json")
    with pytest.raises(OptionError, match="does not exist"):
        Recipe.load(tmp_path / "none.json")


def test_a_recipe_compiles(net, recipe):
    assignment = Options.make(recipe=recipe).assignment
    done = rewrite(net, (X[0],), [canonicalize, merge_siblings, fold_smoothing, quantize_linears], assignment)
    simulation = Simulation(net)
    simulation.schemes = {n: s for n, s in recipe.schemes.items() if n != "*"}
    assert sqnr_db(simulation(X[0]), done.outputs()[0]) > 60
    assert done.counts["quantize_linears"] == sum(s.quantizes for s in simulation.schemes.values())
    with pytest.raises(OptionError, match="leave scheme out"):
        qpass.compile(net, recipe=recipe, scheme="w8a16")
    with pytest.raises(OptionError, match="matches none"):
        qpass.compile(nn.Sequential(nn.Linear(4, 4)).eval(), recipe=recipe)
    with pytest.raises(OptionError, match="recipe takes"):
        qpass.compile(net, recipe=3)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a8-g32", "w3a16-g32"])
def test_simulation_computes_what_the_op_says(net, scheme):
    simulation = Simulation(net)
    simulation(X[0])
    simulation.schemes = dict.fromkeys(("loud", "quiet", "head"), Scheme.parse(scheme))
    (expected,) = rewrite(net, (X[0],), [canonicalize, quantize_linears], scheme).outputs()
    assert sqnr_db(expected, logits_of(simulation(X[0]))) > 60


@pytest.mark.parametrize("budget", ["", "ppl<1%", "bytes<=", "speed<=3%", 3, "ppl<=-1%"])
def test_bad_budgets_are_refused(net, budget):
    with pytest.raises(OptionError, match="a budget is"):
        search(net, X, budget)


def test_what_cannot_be_met_says_what_could(net):
    with pytest.raises(OptionError, match="the least that the candidates allow is"):
        search(net, X, "bytes<=1%", candidates=CANDIDATES)
    with pytest.raises(OptionError, match="the best that the candidates allow costs"):
        search(net, X, "ppl<=0.001%", candidates=("w2a16-g32",))
    with pytest.raises(OptionError, match="needs statistics"):
        search(net, X, candidates=("w8a8-static",))
    with pytest.raises(OptionError, match="empty"):
        search(net, [])


def option(cost, kl):
    return Option(Scheme.parse("w8a16"), cost, float(cost), kl)


def test_the_path_is_the_convex_hull():
    dominated, above = option(9, 3.0), option(6, 2.9)
    best, middle, least = option(10, 0.0), option(5, 1.0), option(2, 4.0)
    assert _hull([dominated, least, best, above, middle]) == [best, middle, least]
    states = list(_path({("a",): [best, middle], ("b",): [option(10, 0.0), option(8, 0.1)]}))
    assert [sum(o.seconds for o in s.values()) for s in states] == [20, 18, 13]


@pytest.mark.parametrize("seed", range(5))
def test_bytes_are_spent_on_the_best_choices_that_fit(seed):
    """Against all combinations: large steps, such as a head's, leave no room unused that others could take."""
    generator = torch.Generator().manual_seed(seed)

    def options(scale):
        sizes = (torch.randint(1, 50, (3,), generator=generator) * scale).tolist()
        return [option(size, float(torch.rand(1, generator=generator))) for size in sizes]

    table = {(str(i),): options(40 if i == 0 else 1) for i in range(6)}
    for share in (0.2, 0.5, 0.8, 1.0):
        limit = int(share * 1000)
        fitting = [c for c in itertools.product(*table.values()) if sum(o.bytes for o in c) <= limit]
        if not fitting:
            continue
        least = min(sum(o.kl for o in combination) for combination in fitting)
        state, _ = _within_bytes(Budget("bytes", share), table, 1000, lambda schemes: 0.0)
        assert list(state) == list(table)
        assert sum(o.bytes for o in state.values()) <= limit
        assert sum(o.kl for o in state.values()) == pytest.approx(least)


def test_names_that_share_an_input_share_a_line():
    choice = Choice(("m.q", "m.k"), "w8a16", 10, 1.0, 0.0)
    assert "m.{q,k}" in Recipe((choice,)).explain()
