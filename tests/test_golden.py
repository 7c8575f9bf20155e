"""Numerical parity with the published implementations, from fixtures.

Walks the folder named by ``EVERYSAT_GOLDEN`` (default ``tests/golden``), whose README describes the format. Everything is
read from the fixture - weights, sizes, inputs, intermediate values, losses, gradients - so fixtures of other seeds, widths,
depths and grids pass too. A kind that nothing implements yet is skipped by its name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_anysat import CHECKS as ANYSAT
from golden_atomizer import CHECKS as ATOMIZER
from golden_dofa import CHECKS as DOFA
from golden_fixture import Fixture, close
from golden_ramen import CHECKS as RAMEN
from golden_scalemae import CHECKS as SCALEMAE
from golden_utae import CHECKS as UTAE
from golden_utt import CHECKS as UTT
from torch import Tensor

from everysat import sensors
from everysat.models import omnisat
from everysat.nn.attention import RelativeTable
from everysat.nn.heads import PlaceHead
from everysat.nn.position import Grid
from everysat.objectives import omnisat as pretraining
from everysat.objectives.contrastive import mil_nce
from everysat.types import Batch, Place, Raster

FOLDER = Path(os.environ.get("EVERYSAT_GOLDEN", Path(__file__).parent / "golden"))
CASES = sorted(p for p in FOLDER.glob("*.json") if json.loads(p.read_text()).get("io"))
PARTS = ("weights", "keys")  # kinds that belong to other fixtures


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_matches_the_published_implementation(path: Path) -> None:
    fixture = Fixture(path)
    kind = fixture.facts["kind"]
    if kind not in CHECKS:
        pytest.skip(f"nothing here implements fixtures of kind {kind}")
    CHECKS[kind](fixture)


def test_there_are_fixtures() -> None:
    assert CASES, f"EVERYSAT_GOLDEN={FOLDER} holds no fixture"


# --- OmniSat -----------------------------------------------------------------------------------------------------------------


def omnisat_config(fixture: Fixture, prefix: str = "") -> dict[str, Any]:
    """Sizes from the weights, patch sizes and channels from the inputs."""
    facts, weights = fixture.facts["config"], {k.removeprefix(prefix): v for k, v in fixture.weights.items()}
    grid = facts["grid"]
    pixels = {n: fixture.io[f"in.{n}"].shape[-1] // grid for n in fixture.facts["modalities"]}
    # Series pixels are 10 m; where there is no series, the size of a patch on the ground is free.
    series = [n for n in pixels if n != "aerial"]
    patch_m = 10.0 * max((pixels[n] for n in series), default=1)
    modalities = {}
    for name in fixture.facts["modalities"]:
        channels = fixture.io[f"in.{name}"].shape[-3]
        modality: dict[str, Any] = {
            "sensor": user_sensor(name, channels, patch_m / pixels[name]),
            "bands": [f"b{i}" for i in range(channels)],
            "gsd_m": patch_m / pixels[name],
            "projector": "image" if name == "aerial" else "mono" if name.endswith("-mono") else "series",
            "origin": "1970-01-01",  # fixtures give plain day numbers
            "normalise_series": f"projector_{name}.in_norm.weight" in weights,
        }
        if name != "aerial":
            stages = ("inconv", "mlp")
            found = [[w.shape[0] for k, w in linear_layers(weights, f"projector_{name}.{s}.")] for s in stages]
            modality["widths"], modality["out_widths"] = found
            # The PASTIS layout (patches of several pixels) counts days over two years.
            modality["period_days"] = 734.0 if pixels[name] > 1 else 367.0
        modalities[name] = modality
    return {
        "modalities": modalities,
        "patch_m": patch_m,
        "grid": grid,
        "dim": facts["dim"],
        "depth": facts["depth"],
        "heads": facts["heads"],
        "key_dim": facts["d_k"],
        "quirks": ["sequence_grid"],
    }


def linear_layers(weights: dict[str, Tensor], prefix: str) -> list[tuple[int, Tensor]]:
    found = {int(k.split(".")[2]): w for k, w in weights.items() if re.fullmatch(re.escape(prefix) + r"\d+\.weight", k)}
    return [(index, found[index]) for index in sorted(found) if found[index].ndim == 2]


def user_sensor(name: str, channels: int, gsd_m: float) -> dict[str, Any]:
    bands = [{"name": f"b{i}"} for i in range(channels)]
    return {
        "name": name,
        "kind": "optical",
        "source": "fixture",
        "defaults": {"gsd_m": gsd_m, "unit": "DN"},
        "bands": bands,
    }


def omnisat_batch(fixture: Fixture, config: dict[str, Any]) -> Batch:
    layers, count = {}, 0
    for name in fixture.facts["modalities"]:
        values = fixture.io[f"in.{name}"]
        table = config["modalities"][name]["sensor"]
        sensor = sensors.from_table(name, {k: v for k, v in table.items() if k != "name"})
        count, dates = len(values), fixture.io.get(f"in.{name}_dates")
        row = torch.arange(count)
        time_s = torch.zeros(count, 2, dtype=torch.float64)
        if dates is not None:
            row = row.repeat_interleave(values.shape[1])
            time_s = (dates.flatten().double() * 86400.0)[:, None].expand(-1, 2)
            values = values.flatten(0, 1)
        seen = torch.ones_like(values, dtype=torch.bool)
        layers[name] = Raster(sensor, values, seen, time_s, row, config["modalities"][name]["gsd_m"])
    side = config["grid"] * config["patch_m"]
    return Batch((Place(side, side),) * count, layers)


def by_place(x: Tensor, count: int) -> Tensor:
    return x.view(count, -1, x.shape[-1])


def check_omnisat_tokens(fixture: Fixture, tokens: Any, prefix: str) -> None:
    for group, name in enumerate(tokens.groups):
        mine = tokens.coords.group == group
        expected = fixture.io[f"{prefix}tokens_{name}"]
        close(by_place(tokens.x[mine], len(expected)), expected, f"tokens of {name}")
        attention = fixture.io.get(f"{prefix}attention_{name}")
        if attention is not None:
            close(tokens.memo["attention"][name].view(attention.shape), attention, f"attention of {name}")


def check_omnisat_encoder(fixture: Fixture) -> None:
    config = omnisat_config(fixture)
    model = omnisat.from_config(config).eval()
    model.load_state_dict(omnisat.convert(fixture.weights, config))
    taps: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: taps.__setitem__(f"block{i}", out))
    for grad in (True, False):  # inference takes other paths: chunks of patches, no pooling positions
        with torch.set_grad_enabled(grad):
            tokens = model.tokenize(omnisat_batch(fixture, config))
            features = model(tokens)
        check_omnisat_tokens(fixture, tokens, "mid.")
        for name, value in taps.items():
            close(value, fixture.io[f"mid.{name}"], name)
        expected = fixture.io["out.tokens"]
        close(features.summary, expected[:, 0], "class token")
        close(by_place(features.mean, len(expected)), expected[:, 1:], "fused tokens")


def check_omnisat_pretrain(fixture: Fixture) -> None:
    config, facts = omnisat_config(fixture, "encoder."), fixture.facts["config"]
    model = omnisat.from_config(config).eval()
    prefix = "encoder."
    encoder = {k.removeprefix(prefix): v for k, v in fixture.weights.items() if k.startswith(prefix)}
    model.load_state_dict(omnisat.convert(encoder, config))
    objective = pretraining.build(
        encoder=model,
        mask_ratio=facts["mask_ratio"],
        tau=facts["tau"],
        top_dates=facts["threshold"],
        drop_last_date=True,
    ).eval()
    objective.load_state_dict(pretraining.convert(fixture.weights))
    tokens = model.tokenize(omnisat_batch(fixture, config), indices=True)
    check_omnisat_tokens(fixture, tokens, "out.")
    count, groups = len(tokens.places), len(tokens.groups)
    noise = fixture.io["in.mask_noise"].view(count, groups, -1)
    assert torch.equal(
        pretraining.hide(tokens, noise, 0.75).view(groups, count, -1).transpose(0, 1).flatten(1).float(),
        fixture.io["out.mask"],
    )
    terms = objective.terms(model, tokens, noise)
    for name, expected in fixture.group("out.loss.").items():
        ours = {"loss": "loss", "contrastive_loss": "contrastive"}.get(name, name.removesuffix("_loss"))
        close(terms[ours], expected, f"loss {name}")
    terms["loss"].backward()
    gradients = {f"encoder.{k}": p.grad for k, p in model.named_parameters()}
    gradients |= {k: p.grad for k, p in objective.named_parameters()}
    for name, expected in fixture.group("grad.").items():
        if name.startswith(prefix):
            ours = prefix + next(iter(omnisat.convert({name.removeprefix(prefix): expected}, config)))
        else:
            ours = next(iter(pretraining.convert({name: expected})))
        close(gradients[ours], expected, f"gradient of {name}")


def check_omnisat_heads_losses(fixture: Fixture) -> None:
    names = {"MILNCE": "all", "MILNCE_nointra": "other_modalities", "MILNCE_naive": "everything"}
    checked = 0
    for key, expected in fixture.group("out.milnce_").items():
        size, variant = key.split(".")
        x = fixture.io[f"in.milnce_{size}"]
        index = torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3]))
        close(mil_nce(x.flatten(0, 2), *index.T, tau=0.1, negatives=names[variant]), expected, key)
        checked += 1
    for key, expected in fixture.group("out.irpe.bias.").items():
        table = RelativeTable(expected.shape[-1])
        table.table = torch.nn.Parameter(fixture.io["in.irpe.lookup"])
        query = table(fixture.io[f"in.irpe.q.{key}"])
        grid = Grid.guessed(expected.shape[-1])
        close(query.gather(-1, grid.buckets().expand(*query.shape[:2], -1, -1)), expected, f"relative bias {key}")
        checked += 1
    assert checked
    check_omnisat_heads(fixture)


def check_omnisat_heads(fixture: Fixture) -> None:
    """The two published heads on the class token of the encoder fixture that the weights belong to."""
    encoder = Fixture(fixture.folder / fixture.facts["weights"][0].replace(".weights.safetensors", ".json"))
    config = omnisat_config(encoder)
    model = omnisat.from_config(config).eval()
    model.load_state_dict(omnisat.convert(encoder.weights, config))
    features = model.embed(omnisat_batch(encoder, config))
    for kind, name, first in (
        ("linear", "finetune", "finetune_head.0."),
        ("norm", "supervised", "supervised_head.mlp."),
    ):
        expected = fixture.io[f"out.{name}_logits"]
        head = PlaceHead(kind, model.dim, expected.shape[1])
        head.head.load_state_dict(
            {k.removeprefix(first): v for k, v in fixture.group("w.").items() if k.startswith(first)}
        )
        close(head(features)[0][:, :, 0, 0], expected, f"{name} head")


CHECKS: dict[str, Callable[[Fixture], None]] = {
    "omnisat.encoder": check_omnisat_encoder,
    "omnisat.pretrain": check_omnisat_pretrain,
    "omnisat.heads_losses": check_omnisat_heads_losses,
    **ANYSAT,
    **ATOMIZER,
    **DOFA,
    **RAMEN,
    **SCALEMAE,
    **UTAE,
    **UTT,
}
