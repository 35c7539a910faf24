"""What a linear is called: as named_modules() would print it."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from qpass.passes import canonicalize
from tests.support.capture import Body, rewrite

X = (torch.randn(3, 32),)


def names(function, inputs=X):
    done = rewrite(function, inputs, [canonicalize])
    return [node.meta["qpass_names"] for node in done.nodes(torch.ops.qpass.linear.default)]


def test_nested_modules():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(32, 32), nn.ReLU()), nn.ModuleDict({"proj": nn.Linear(32, 8)})["proj"]
    )
    assert names(model) == [("0.0",), ("1",)]


def test_a_bound_forward():
    assert names(nn.Sequential(nn.Linear(32, 8)).forward) == [("0",)]


def test_the_module_itself():
    assert names(nn.Linear(32, 8)) == [("weight",)]


def test_a_function_over_one_module():
    model = nn.Sequential(nn.Linear(32, 8))
    assert names(lambda x: model(x) * 2) == [("0",)]


def test_a_function_over_two_modules():
    draft, verify = nn.Sequential(nn.Linear(32, 8)), nn.Sequential(nn.Linear(32, 8))
    assert names(lambda x: (draft(x), verify(x))) == [("draft.0",), ("verify.0",)]


def test_a_decorated_forward():
    """As transformers 5.24 renames arguments: the module is the wrapper's first argument."""

    class Decorated(nn.Sequential):
        def forward(self, *args, **kwargs):
            return nn.Sequential.forward(self, *args, **kwargs)

    def deprecating(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    Decorated.forward = deprecating(Decorated.forward)
    assert names(Decorated(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))) == [("0",), ("2",)]


def test_parameters_that_are_no_linear_module():
    module = Body(
        lambda m, x: F.linear(F.linear(x, m.in_weight), m.out.weight),
        in_weight=nn.Parameter(torch.randn(16, 32)),
        out=nn.Linear(16, 8),
    )
    assert names(module) == [("in_weight",), ("out",)]


def test_a_tied_head_has_its_own_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 32)
            self.lm_head = nn.Linear(32, 10, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, ids):
            return self.lm_head(self.embed(ids))

    assert names(Tied(), (torch.tensor([1, 2, 3]),)) == [("lm_head",)]


def test_one_module_under_two_names_has_the_name_that_it_is_called_by():
    linear = nn.Linear(32, 32)
    assert names(nn.Sequential(linear, nn.ReLU(), linear)) == [("0",), ("2",)]
