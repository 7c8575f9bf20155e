"""The drop-in call: what it takes and refuses. Its numbers are checked by the fixtures of test_golden.py."""

from __future__ import annotations

import pytest
import torch

from everysat.hub import AnySat
from everysat.models import anysat, weights


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    encoder = anysat.build("nano", modalities=["aerial", "s2", "modis"], **anysat.PUBLISHED)
    return weights.save(tmp_path_factory.mktemp("hub") / "a.safetensors", encoder)


@pytest.fixture(scope="module")
def model(file) -> AnySat:
    return AnySat.from_pretrained(file)


def layers(batch: int = 2, height: int = 6, width: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "s2": torch.randn(batch, 3, 10, height, width, generator=g),
        "s2_dates": torch.tensor([[10, 100, 200]] * batch),
        "aerial": torch.randn(batch, 4, height * 50, width * 50, generator=g),
    }


def test_outputs_have_the_published_shapes(model) -> None:
    x = layers()
    shapes = {o: tuple(model(x, 20, o).shape) for o in ("tile", "patch", "all")}
    assert shapes == {"tile": (2, 64), "patch": (2, 3, 2, 64), "all": (2, 7, 64)}
    assert model(x, 20, "dense").shape == (2, 6, 4, 128)  # the first layer
    assert model(x, 20, "dense", "aerial").shape == (2, 30, 20, 128)


def test_raster_order_is_a_matter_of_cells_alone(file, model) -> None:
    x = layers()
    published, true = (m(x, 20, "dense", "aerial") for m in (model, AnySat.from_pretrained(file, raster_order=True)))
    assert not torch.allclose(published, true)
    both = (t.reshape(2, 3, 10, 2, 10, 128).permute(0, 1, 3, 2, 4, 5).flatten(3, 4) for t in (published, true))
    ours, theirs = (t[0, 0, 0].norm(dim=1).sort().values for t in both)
    torch.testing.assert_close(ours, theirs)


def test_flash_attention_is_the_other_layout(file, model) -> None:
    x = layers()
    assert not torch.allclose(model(x, 20), AnySat.from_pretrained(file, flash_attn=True)(x, 20), atol=1e-4)


def test_masks_and_modis_are_taken(model) -> None:
    x = layers()
    plain = model(x, 20)
    mask = torch.ones_like(x["s2"])
    torch.testing.assert_close(model({**x, "s2_mask": mask}, 20), plain)
    mask[:, 0] = 0
    assert not torch.allclose(model({**x, "s2_mask": mask}, 20), plain, atol=1e-5)
    modis = {"modis": torch.randn(2, 3, 7, 1, 1), "modis_dates": x["s2_dates"]}
    assert not torch.allclose(model({**x, **modis}, 20), plain, atol=1e-5)


def test_gradients_flow(model) -> None:
    model(layers(), 20, "tile").sum().backward()
    assert model.model.class_token.grad is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"s3": torch.zeros(1)}, LookupError, "'s3'.*s2"),
        ({"s2_dates": None}, ValueError, "s2_dates.*expected \\(2, 3\\)"),
        ({"s2": torch.zeros(2, 10, 6, 4)}, ValueError, "expected 5 axes"),
        ({"aerial": torch.zeros(3, 4, 300, 200)}, ValueError, "batch 2"),
    ],
)
def test_wrong_input_is_explained(model, change, error, message) -> None:
    x = {k: v for k, v in {**layers(), **change}.items() if v is not None}
    with pytest.raises(error, match=message):
        model(x, 20)


def test_wrong_calls_are_explained(model, tmp_path) -> None:
    with pytest.raises(ValueError, match="output='tiles'"):
        model(layers(), 20, "tiles")
    from everysat.models import omnisat

    other = weights.save(tmp_path / "o.safetensors", omnisat.build("tiny"))
    with pytest.raises(ValueError, match="not anysat"):
        AnySat.from_pretrained(other)
