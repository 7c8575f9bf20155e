"""Checks of the fixtures of the published Atomizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_fixture import Fixture, close
from torch import Tensor
from torch.nn import functional as F

from everysat import sensors
from everysat.models import atomizer
from everysat.types import Batch, Place, Raster, Tokens


def anchors(facts: dict[str, Any]) -> list[tuple[float, float]]:
    return [(float(g["mean"]), float(g["std"])) for g in facts["config"]["wavelengths_encoding"].values()]


def configured(fixture: Fixture, **changes: Any) -> atomizer.Atomizer:
    """The encoder with the weights of the fixture."""
    facts, args, sizes = fixture.facts, fixture.facts["args"], fixture.facts["config"]["Atomiser"]
    names = list(facts["bands"])
    bands = [
        {"name": name, "wavelength_um": b["central_wavelength"] / 1000, "width_um": b["bandwidth"] / 1000}
        for name, b in facts["bands"].items()
    ]
    sensor = {"name": "fixture", "kind": "optical", "source": "fixture"}
    sensor |= {"defaults": {"gsd_m": 10.0, "unit": "DN"}, "bands": bands}
    zeros, ones = (0.0,) * len(names), (1.0,) * len(names)
    layer = {"sensor": sensor, "bands": names, "gsd_m": 10.0, "mean": zeros, "std": ones}
    config = {
        **atomizer.VARIANTS["bmvc"],
        "modalities": {"s2": layer},
        "anchors": anchors(facts),
        "value_highest": sizes["bandvalue_max_freq"],
        "value_count": sizes["bandvalue_num_freq_bands"],
        "place_highest": sizes["pos_max_freq"],
        "place_count": sizes["pos_num_freq_bands"],
        "dim": args["latent_dim"],
        "latents": args["num_latents"],
        "depth": args["depth"],
        "per_cross": args["self_per_cross_attn"],
        "heads": args["latent_heads"],
        "head_dim": args["latent_dim_head"],
        "cross_heads": args["cross_heads"],
        "cross_head_dim": args["cross_dim_head"],
        "tied": args["weight_tie_layers"],
        **changes,
    }
    model = atomizer.from_config(config).eval()
    model.load_state_dict(atomizer.convert(fixture.weights, config))
    return model


def places(fixture: Fixture, model: atomizer.Atomizer) -> list[tuple[Tokens, Tensor]]:
    """Tokens of each sample alone, since each has its own resolution, and the published number of each: y, x, band."""
    found = []
    for image, mask, factor in zip(*(fixture.io[f"in.{n}"] for n in ("img", "mask", "resolution")), strict=True):
        gsd_m = 10.0 / float(factor)
        sensor = sensors.from_table("fixture", {k: v for k, v in _table(model).items() if k != "name"})
        raster = Raster.of(sensor, image[None], gsd_m, valid=mask[None] > 0)
        place = Place(image.shape[1] * gsd_m, image.shape[2] * gsd_m)
        tokens = model.tokenize(Batch((place,), {"s2": raster}))
        cell = torch.floor(tokens.coords.at_m / gsd_m).long()
        number = (cell[:, 0] * image.shape[2] + cell[:, 1]) * image.shape[0] + tokens.coords.group
        found.append((tokens, number))
    return found


def _table(model: atomizer.Atomizer) -> dict[str, Any]:
    table = model.settings.modalities["s2"].sensor
    assert isinstance(table, dict)
    return table


def logits(fixture: Fixture, summary: Tensor) -> Tensor:
    return F.linear(summary, fixture.weights["to_logits.2.weight"], fixture.weights["to_logits.2.bias"])


def check_bmvc(fixture: Fixture) -> None:
    model, june = configured(fixture), configured(fixture, quirks=_with_temperature())
    share = 0.6
    for sample, (tokens, number) in enumerate(places(fixture, model)):
        rows = tokens.coords.row
        atoms = model.atoms(tokens)
        written, expected = atoms.written(), fixture.io["out.tokens"][sample]
        shown = number < len(expected)
        close(written[shown], expected[number[shown]], f"tokens of sample {sample}")
        kept: list[Tensor] = []
        later: list[Tensor] = []
        for layer in range(model.settings.depth):
            order = fixture.io[f"in.perm{layer}"]
            kept.append(_among(number, order[int(len(order) * share) :]))
            if layer == 0:
                pool = order[int(len(order) * share) :]
            else:
                choice = fixture.io[f"in_june.perm{layer}"]
                pool = pool[choice[int(len(pool) * share) :]]
            later.append(_among(number, pool))
        for name, which, some in (
            ("", model, []),
            ("_pruned60", model, kept),
            ("june", june, []),
            ("june", june, later),
        ):
            with torch.no_grad():
                states = which.states(atoms, rows, 1, some)
                ours = logits(fixture, which.pooling(states[-1]))[0]
            if name == "june":
                expected = fixture.io["out_june.logits_pruned60" if some else "out_june.logits"]
            else:
                expected = fixture.io[f"out.logits{name}"]
                _check_latents(fixture, f"out.latents{name}_layer", sample, states)
            close(ours, expected[sample], f"logits {name} of sample {sample}, {len(some)} prunings")
        labels, target = fixture.io["in.labels"], fixture.io["out.bce_loss"]
    close(F.binary_cross_entropy_with_logits(fixture.io["out.logits"], labels), target[0], "loss")


def _with_temperature() -> tuple[str, ...]:
    return (*atomizer.VARIANTS["bmvc"]["quirks"], "temperature_10")


def _among(number: Tensor, some: Tensor) -> Tensor:
    """Which of the tokens, by their published number, are among some: indices."""
    return torch.nonzero(torch.isin(number, some)).flatten()


def _check_latents(fixture: Fixture, prefix: str, sample: int, states: list[Tensor]) -> None:
    """The taps hang on the listed layers: those of tied ones give each state as often as they are listed."""
    tied = fixture.facts["args"]["weight_tie_layers"]
    listed = [states[0], *(s for s in states[1:] for _ in range(len(states) - 1 if tied else 1))]
    expected = fixture.group(prefix)
    assert len(expected) == len(listed)
    for number, ours in enumerate(listed):
        close(ours[0], expected[str(number)][sample], f"{prefix}{number} of sample {sample}")


CHECKS: dict[str, Callable[[Fixture], None]] = {"atomizer.bmvc": check_bmvc}
