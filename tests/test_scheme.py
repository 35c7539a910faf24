"""Names to schemes and back, and the one formula."""

from __future__ import annotations

import pytest
import torch

from qpass.errors import SchemeError
from qpass.qweight import QWeight
from qpass.scheme import BITS, GROUPS, SCHEMES, Format, Scheme


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [
        ("w16a16", None, "a16"),
        ("w8a16", Format(8, None, True), "a16"),
        ("w4a16-g128", Format(4, 128, False), "a16"),
        ("w4a16-g32-sym", Format(4, 32, True), "a16"),
        ("w8a16-asym", Format(8, None, False), "a16"),
        ("w4a16", Format(4, None, False), "a16"),
        ("w4a8-g64", Format(4, 64, False), "a8-token-group"),
        ("w4a8", Format(4, None, False), "a8-token"),
        ("w8a8-dynamic", Format(8, None, True), "a8-token"),
        ("w3a16-g64", Format(3, 64, False), "a16"),
        ("w4a16-g32-floatzero", Format(4, 32, False, True), "a16"),
        ("w8a8-floatzero", Format(8, None, False, True), "a8-token"),
        ("w3a8-g64-sym", Format(3, 64, True), "a8-token-group"),
        ("w2a16-g32", Format(2, 32, False), "a16"),
        ("w2a8-g16-dynamic", Format(2, 16, False), "a8-token-group"),
        ("w2a8", Format(2, None, False), "a8-token"),
        ("w8a16-g16", Format(8, 16, True), "a16"),
        ("w8a8-static", Format(8, None, True), "a8-static"),
        ("w4a8-g128-static", Format(4, 128, False), "a8-static"),
        ("w8a8-outlier", Format(8, None, True), "a8-token"),
        ("w4a8-g128-intscale", Format(4, 128, False, integer_scales=True), "a8-token"),
        ("w3a8-g16-sym-intscale-static", Format(3, 16, True, integer_scales=True), "a8-static"),
    ],
)
def test_parse(name: str, weight: Format | None, activation: str) -> None:
    scheme = Scheme.parse(name)
    assert (scheme.weight, scheme.activation) == (weight, activation)
    assert str(scheme) == name
    assert scheme.quantizes == (weight is not None)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int8",
        "w4",
        "w5a16",
        "w1a16",
        "w2a16-g8",
        "w3a16-g48",
        "w4a4",
        "w4a16-g",
        "w4a16-g100",
        "w4a16-g128-odd",
        "w4a16-g128-intscale",
        "w8a8-g128-intscale",
        "w4a8-intscale",
        "w4a8-g64-floatzero-intscale",
        "w16a16-g128",
        "w16a8",
        "w8a16-dynamic",
        "w4a16-g-128",
        " w8a16",
    ],
)
def test_refused_names_say_what_is_accepted(name: str) -> None:
    with pytest.raises(SchemeError, match=r"w<2\|3\|4\|8>a<16\|8>-g<|16, 32, 64, 128"):
        Scheme.parse(name)


@pytest.mark.parametrize("name", ["w8a8-static", "w4a8-g128-static", "w8a8-outlier"])
def test_what_needs_calibration_says_so(name: str) -> None:
    assert Scheme.parse(name).needs_statistics
    assert not any(Scheme.parse(n).needs_statistics for n in ("w8a8-dynamic", "w4a8-g64", "w8a16"))


@pytest.mark.parametrize("name", ["w4a8-outlier", "w8a8-g64-outlier", "w8a16-static", "w8a8-static-dynamic"])
def test_what_has_no_such_form_is_refused(name: str) -> None:
    with pytest.raises(SchemeError, match="accepted: "):
        Scheme.parse(name)


def test_a_static_scheme_is_named_by_its_format() -> None:
    for name in ("w8a8-static", "w4a8-g64-static", "w4a8-g64-sym-static"):
        scheme = Scheme.parse(name)
        assert Scheme.of(scheme.weight, scheme.activation) == scheme


def test_every_bits_group_and_symmetry_has_a_name() -> None:
    for bits in BITS:
        for group in (None, *GROUPS):
            for symmetric in (True, False):
                tail = f"{f'-g{group}' if group else ''}-{'sym' if symmetric else 'asym'}"
                for act, rule in ((16, "a16"), (8, "a8-token-group" if group else "a8-token")):
                    scheme = Scheme.parse(f"w{bits}a{act}{tail}")
                    assert (scheme.weight, scheme.activation) == (Format(bits, group, symmetric), rule)


def test_documented_schemes_parse_to_themselves() -> None:
    assert all(Scheme.parse(name) == scheme for name, scheme in SCHEMES.items())


def test_dequantize_is_the_formula() -> None:
    codes = torch.tensor([[0, 15, 7, 8, 3]], dtype=torch.uint8)
    weight = QWeight(codes, torch.tensor([[0.5, 2.0]]), torch.tensor([[8, 3]], dtype=torch.uint8), Format(4, 4))
    assert weight.dequantize().tolist() == [[-4.0, 3.5, -0.5, 0.0, 0.0]]


@pytest.mark.parametrize("field", ["codes", "scales", "zeros"])
def test_a_qweight_of_the_wrong_form_is_refused(field: str) -> None:
    good = {
        "codes": torch.zeros(4, 64, dtype=torch.uint8),
        "scales": torch.ones(4, 2),
        "zeros": torch.zeros(4, 2, dtype=torch.uint8),
    }
    QWeight(**good, format=Format(4, 32))
    for bad in (good[field][:2], good[field].double()):
        if field == "codes" and bad.dtype == torch.uint8:
            continue  # fewer rows of codes: then scales and zeros are the wrong ones, below
        with pytest.raises(ValueError, match=field):
            QWeight(**(good | {field: bad}), format=Format(4, 32))
    with pytest.raises(ValueError, match="scales"):
        QWeight(**(good | {"codes": good["codes"][:2]}), format=Format(4, 32))
