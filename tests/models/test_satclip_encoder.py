"""SatCLIP's location encoder: keys and formulas of the public code."""

from __future__ import annotations

import math

import pytest
import torch

from everysat.models import satclip, weights
from everysat.types import Batch, ContractError, Place

SHAPES = {
    "layers.0.weight": (512, 100),
    "layers.0.bias": (512,),
    "layers.1.weight": (512, 512),
    "layers.1.bias": (512,),
    "last_layer.weight": (256, 512),
    "last_layer.bias": (256,),
}
"""What ``SirenNet`` of the public code holds for L = 10, capacity 512, two hidden layers, in double precision."""


def checkpoint(generator: torch.Generator) -> dict[str, torch.Tensor]:
    tensors = {k: torch.randn(s, generator=generator, dtype=torch.float64) / s[-1] for k, s in SHAPES.items()}
    return {
        "model.logit_scale": torch.tensor(2.6),
        "model.visual.fc.weight": torch.zeros(256, 4),
        **{f"model.nnet.{key}": value for key, value in tensors.items()},
        **{f"model.location.nnet.{key}": value for key, value in tensors.items()},
    }


def test_a_checkpoint_is_converted_whole(generator, tmp_path) -> None:
    file = tmp_path / "satclip.ckpt"
    state = checkpoint(generator)
    torch.save({"state_dict": state}, file)
    done = weights.convert("satclip/l10", file, tmp_path / "l10.safetensors")
    assert done.kept == 6
    assert len(done.dropped) == 8
    model = weights.load(tmp_path / "l10.safetensors")
    assert model.config["quirks"] == ["zonal_pi"]
    lonlat = torch.tensor([[2.35, 48.86], [-58.4, -34.6], [179.9, 0.1]], dtype=torch.float64)
    x = model.code(lonlat).double()  # type: ignore[operator]
    for number in range(2):
        w, b = (state[f"model.location.nnet.layers.{number}.{part}"] for part in ("weight", "bias"))
        x = torch.sin((30.0 if number == 0 else 1.0) * (x @ w.T + b))
    expected = (
        x @ state["model.location.nnet.last_layer.weight"].T + state["model.location.nnet.last_layer.bias"]
    ).float()
    torch.testing.assert_close(model.of(lonlat), expected, rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_the_location_encoder_alone_is_taken_too(generator) -> None:
    model = satclip.build("l10")
    state = {k.removeprefix("model.location."): v for k, v in checkpoint(generator).items() if "location" in k}
    weights.load_strictly(model, satclip.convert(state, model.config), "location encoder")


def test_other_sizes_are_refused(generator) -> None:
    model = satclip.build("l40")
    state = {k: v for k, v in checkpoint(generator).items() if "location" in k}
    with pytest.raises(ContractError, match="expected \\[512, 1600\\]"):
        weights.load_strictly(model, satclip.convert(state, model.config), "l10")


def test_first_harmonics_have_the_published_constants() -> None:
    """The generated formulas up to degree 2, with angles longitude + 180 and latitude + 90 degrees."""
    lonlat = torch.tensor([[13.0, 52.0], [-70.0, -33.0]], dtype=torch.float64)
    phi, theta = torch.deg2rad(lonlat[:, 0] + 180), torch.deg2rad(lonlat[:, 1] + 90)
    s, c = theta.sin(), theta.cos()
    expected = [
        torch.full_like(c, 0.886226925452758),
        0.48860251190292 * s * phi.sin(),
        1.53499006191973 * c,
        0.48860251190292 * s * phi.cos(),
        0.18209140509868 * 3 * s**2 * (2 * phi).sin(),
        1.09254843059208 * s * c * phi.sin(),
        2.97249547320451 * c**2 - 0.990831824401503,
    ]
    code = satclip.build("nano", degrees=3, quirks=("zonal_pi",)).double().code(lonlat)
    torch.testing.assert_close(code[:, :7], torch.stack(expected, -1), rtol=0, atol=1e-12)


def test_closed_form_has_the_other_sign_of_odd_orders() -> None:
    lonlat = torch.tensor([[13.0, 52.0]], dtype=torch.float64)
    plain, other = (satclip.build("nano", calculation=c).code(lonlat)[0] for c in ("analytic", "closed-form"))
    odd = torch.tensor([order % 2 == 1 for degree in range(5) for order in range(-degree, degree + 1)])
    torch.testing.assert_close(other, torch.where(odd, -plain, plain))


def test_places_a_world_apart_differ_and_the_date_line_does_not() -> None:
    torch.manual_seed(0)
    model = satclip.build("nano").eval()
    west, east, far = model.of(torch.tensor([[-180.0, 10.0], [180.0, 10.0], [0.0, -40.0]]))
    torch.testing.assert_close(west, east, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(west, far, atol=1e-2)


def test_dropout_is_of_training_alone() -> None:
    torch.manual_seed(0)
    model = satclip.build("nano", dropout=0.5)
    at = torch.tensor([[5.0, 45.0]])
    assert not torch.equal(model.of(at), model.of(at))
    assert torch.equal(model.eval().of(at), model.of(at))


def test_a_place_without_position_is_refused() -> None:
    with pytest.raises(ContractError, match="place 1 of 2 has no lonlat"):
        satclip.build("nano").embed(Batch((Place(10.0, 10.0, lonlat=(1.0, 2.0)), Place(10.0, 10.0))))
    with pytest.raises(ContractError, match="in this order"):
        satclip.build("nano").of(torch.tensor([[48.0, 120.0]]))
    with pytest.raises(ContractError, match="in this order"):
        satclip.build("nano").of(torch.tensor([[math.nan, 0.0]]))


def test_an_unknown_variant_is_an_error() -> None:
    with pytest.raises(LookupError, match="l40"):
        satclip.build("l4")
