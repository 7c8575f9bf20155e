"""ResNet-18: the published number of weights, what a token sees, dates and sizes, and what is refused. The common laws are in test_laws.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from everysat import sensors
from everysat.models import resnet
from everysat.types import Batch, ContractError, Place, Raster

RGB = {
    "rgb": {"sensor": "rgb-image", "bands": ["red", "green", "blue"], "gsd_m": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3}
}
SMALL = {"modalities": RGB, "width": 4}


def chip(generator, side_px=32, rows=1, obs=1):
    values = torch.randn(rows * obs, 3, side_px, side_px, generator=generator)
    raster = Raster.of(sensors.get("rgb-image"), values, 1.0)
    raster = replace(raster, row=torch.arange(rows).repeat_interleave(obs))
    return Batch((Place(side_px, side_px),) * rows, {"rgb": raster})


def test_it_has_the_published_number_of_weights() -> None:
    """11,689,512 of ResNet-18 less the 513,000 of its classes of ImageNet; chips have a first convolution of 3 x 3 in place of 7 x 7."""
    count = {v: sum(p.numel() for p in resnet.build(v).parameters()) for v in ("large", "small")}
    assert count == {"large": 11_176_512, "small": 11_176_512 - 3 * 64 * (49 - 9)}
    assert resnet.build("small").dim == 512


@pytest.mark.parametrize(("stem", "stride"), [("small", 8), ("large", 32)])
def test_the_network_is_that_of_the_paper(generator, stem, stride) -> None:
    """Against its equations in plain functions, with running statistics that are not those of the start."""
    net = resnet.build("", stem=stem, **SMALL)
    for name, tensor in net.state_dict().items():
        if "running_mean" in name or ("bn" in name and name.endswith("bias")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    w, batch = net.state_dict(), chip(generator, 64, rows=2)
    norm = lambda x, name: F.batch_norm(  # noqa: E731
        x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"]
    )
    x = batch.raster("rgb").values
    x = (
        F.conv2d(x, w["conv.weight"], stride=1, padding=1)
        if stem == "small"
        else F.conv2d(x, w["conv.weight"], stride=2, padding=3)
    )
    x = norm(x, "norm").relu()
    x = x if stem == "small" else F.max_pool2d(x, 3, 2, 1)
    for stage in range(4):
        for block in range(2):
            at, stride_of = f"stages.{stage}.{block}", 2 if stage and not block else 1
            y = norm(F.conv2d(x, w[f"{at}.conv1.weight"], stride=stride_of, padding=1), f"{at}.bn1").relu()
            y = norm(F.conv2d(y, w[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            if f"{at}.downsample.0.weight" in w:
                x = norm(F.conv2d(x, w[f"{at}.downsample.0.weight"], stride=stride_of), f"{at}.downsample.1")
            x = (x + y).relu()
    assert x.shape[2] == 64 // stride
    found = net.embed(batch)
    torch.testing.assert_close(found.grid(), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.summary, x.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert net.settings.token_m == stride


def test_several_images_of_a_place_are_averaged_and_unseen_ground_is_no_token(generator) -> None:
    net = resnet.build("", **SMALL)
    both = chip(generator, 32, obs=2)
    one, two = (both.adding(rgb=both.raster("rgb").obs(torch.tensor([i]))) for i in (0, 1))
    torch.testing.assert_close(net.embed(both).mean, (net.embed(one).mean + net.embed(two).mean) / 2)
    valid = torch.ones_like(one.raster("rgb").valid)
    valid[..., :16] = False
    half = net.embed(one.adding(rgb=replace(one.raster("rgb"), valid=valid)))
    assert half.coords.at_m[:, 1].min() == 20
    assert len(half.mean) == 8


def test_layers_that_do_not_fit_are_refused(generator) -> None:
    with pytest.raises(ValueError, match=r"lists 2 layers \(rgb, s2\)"):
        resnet.build("", modalities={**RGB, "s2": RGB["rgb"]})
    with pytest.raises(LookupError, match="Did you mean small"):
        resnet.build("smal")
    blind = {"rgb": {k: v for k, v in RGB["rgb"].items() if k not in ("mean", "std")}}
    with pytest.raises(ContractError, match="statistics to data"):
        resnet.build("", modalities=blind, width=4).embed(chip(generator))
