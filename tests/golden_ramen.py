"""Checks of the fixtures of the published RAMEN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from golden_fixture import Fixture, close
from torch import Tensor

from everysat import sensors
from everysat.models import ramen
from everysat.objectives import mae
from everysat.types import Batch, Place, Raster

DAY_S = 86400.0
ORBITS = {"asc": "ascending", "des": "descending"}


def modality(name: str, codes: list[Any], gsd_m: float) -> dict[str, Any]:
    """A layer whose bands are given as wavelengths in nm, orbit and polarisation, or terrain quantities."""
    kind, bands = "optical", []
    for i, code in enumerate(codes):
        band: dict[str, Any] = {"name": f"b{i}", "gsd_m": gsd_m, "unit": "DN"}
        if isinstance(code, str) and "_" in code:
            orbit, polarisation = code.split("_")
            kind, band = "sar", band | {"polarisation": polarisation.upper(), "orbit": ORBITS[orbit]}
        elif isinstance(code, str):
            kind, band["name"] = "terrain", code
        else:
            band["wavelength_um"] = code / 1000.0
        bands.append(band)
    table = {"name": name, "kind": kind, "source": "fixture", "bands": bands}
    plain = {"mean": [0.0] * len(bands), "std": [1.0] * len(bands)}
    return {"sensor": table, "bands": [band["name"] for band in bands], "gsd_m": gsd_m, **plain}


def layer(described: dict[str, Any], values: Tensor, dates: Tensor | None) -> Raster:
    """A raster of ``values`` [place, date, band, y, x] at day numbers ``dates``."""
    table = described["sensor"]
    sensor = sensors.from_table(table["name"], {k: v for k, v in table.items() if k != "name"})
    places, count = values.shape[:2]
    days = torch.ones(places, count) if dates is None else dates.reshape(places, count)
    time_s = (days.double().flatten()[:, None] - 1 + torch.tensor([0.0, 1.0])) * DAY_S
    flat = values.flatten(0, 1)
    row = torch.arange(places).repeat_interleave(count)
    return Raster(sensor, flat, torch.ones_like(flat, dtype=torch.bool), time_s, row, described["gsd_m"])


def model_of(weights: dict[str, Tensor], described: dict[str, Any], facts: dict[str, Any], gsd_m: float) -> ramen.Ramen:
    config = {
        "modalities": described,
        "gsd_m": gsd_m,
        "output": "layer",
        "dim": facts["embed_dim"],
        "depth": facts["depth"],
        "heads": facts["num_heads"],
        **ramen.PUBLISHED,
        "block_norm_eps": facts["block_layernorm_eps"],
    }
    model = ramen.from_config(config).eval()
    state = ramen.convert(weights, config)
    assert state.keys() <= model.state_dict().keys()
    model.load_state_dict({**model.state_dict(), **state})  # fixtures of one date lack the temporal part
    return model


def per_place(x: Tensor, places: int) -> Tensor:
    return x.view(places, -1, x.shape[-1])


def check_mae(fixture: Fixture) -> None:
    for number, case in enumerate(fixture.facts["cases"]):
        check_mae_case(fixture, case, f"case{number}")


def check_mae_case(fixture: Fixture, case: dict[str, Any], name: str) -> None:
    facts, config, data = fixture.facts, fixture.facts["config"], case["dataset"]
    kept = case["modalities_keep"]
    described = {n: modality(n, config["wavelengths"][data][n], config["modalities_res"][data][n]) for n in kept}
    part = {
        p: {k.removeprefix(f"{p}."): v for k, v in fixture.weights.items() if k.startswith(p)}
        for p in ("encoder", "decoder")
    }
    sizes = {**facts["encoder"], "block_layernorm_eps": facts["block_layernorm_eps"]}
    model = model_of(part["encoder"], described, sizes, case["effective_res"])
    options = {
        "dim": facts["decoder"]["decoder_embed_dim"],
        "depth": facts["decoder"]["depth"],
        "heads": facts["decoder"]["num_heads"],
        "eps": facts["block_layernorm_eps"],
    }
    objective = mae.build(encoder=model, mask_ratio=facts["mask_ratio"], targets="pixel", **options).eval()
    objective.load_state_dict(mae.convert(ramen.channels(part["decoder"])))
    io, inputs = fixture.group(f"out.{name}."), fixture.group(f"in.{data}.")
    layers = {n: layer(described[n], inputs[n], inputs.get(f"{n}_dates")) for n in kept}
    count = len(inputs[kept[0]])
    side = config["modalities_input_size"][data][kept[0]] * config["modalities_res"][data][kept[0]]
    tokens = model.tokenize(Batch((Place(side, side),) * count, layers))
    tokens = tokens[torch.argsort(tokens.coords.row, stable=True)]  # fixtures list the tokens of a place together
    ready = model.in_norm(tokens.x) + model.positions(tokens.coords)
    close(per_place(ready, count), io["proj_tokens"], f"{name} projected tokens")
    noise = fixture.io[f"in.{name}.noise"].flatten()
    keep = objective.kept(tokens, noise)
    assert torch.equal((~keep).view(count, -1).float(), io["mask"])
    for eps, prefix in ((facts["block_layernorm_eps"], "out"), (1e-6, "out_eps1e-6")):
        check_encoded(model, tokens, fixture.io[f"{prefix}.{name}.encoder_tokens"], eps, f"{name} eps {eps}")
    for block in model.blocks:
        block.norm1.eps = block.norm2.eps = facts["block_layernorm_eps"]
    check_reconstruction(objective, model, tokens, keep, io, name)
    terms = objective.terms(model, tokens, noise)
    for layer_name in kept:
        close(terms[layer_name].view(1), io[f"{layer_name}_reconstruction_loss"], f"{name} loss of {layer_name}")
    close(terms["loss"].view(1), io["loss"], f"{name} loss")
    terms["loss"].backward()
    check_gradients(model, objective, fixture.facts["grad_norms"][name], name)


def check_encoded(model: ramen.Ramen, tokens: Any, expected: Tensor, eps: float, what: str) -> None:
    """The fixture's encoder output is of all tokens or of the shown ones, whichever its length says."""
    for block in model.blocks:
        block.norm1.eps = block.norm2.eps = eps
    with torch.no_grad():
        features = model(tokens)
    count = len(tokens.places)
    close(features.summary, expected[:, 0], f"{what} class token")
    close(per_place(features.mean, count), expected[:, 1:], f"{what} tokens")


def check_reconstruction(
    objective: mae.Mae, model: Any, tokens: Any, keep: Tensor, io: dict[str, Tensor], name: str
) -> None:
    with torch.no_grad():
        decoded = objective.decoder(model(tokens[keep]), tokens, keep)
        for group, layer_name in enumerate(tokens.groups):
            mine = tokens.coords.group == group
            values, _ = objective.reconstructed(model, tokens, layer_name, decoded[mine], keep[mine], mine)
            expected = io[f"rec.{layer_name}"].flatten(0, 1).permute(0, 3, 1, 2)
            close(values, expected, f"{name} reconstruction of {layer_name}")


def check_gradients(model: ramen.Ramen, objective: mae.Mae, expected: dict[str, float], name: str) -> None:
    ours = {f"encoder.{k}": p.grad for k, p in model.named_parameters()}
    ours |= {k: p.grad for k, p in objective.named_parameters()}
    for key, norm in expected.items():
        part, rest = key.split(".", 1)
        if rest.endswith("_param"):
            kind, band = rest.removesuffix("_param").split("_projector.")
            owner = {"radar": "radar", "dem": "terrain"}[kind]
            codes = getattr((model if part == "encoder" else objective.decoder).bands, owner)
            found = codes.codes.grad[codes.names.index(band)]
        else:
            marker = {rest: torch.zeros(1, 1, 1, 1)}
            mapped = ramen.convert(marker, {}) if part == "encoder" else mae.convert(ramen.channels(marker))
            if not mapped:
                assert norm < 1e-4, f"{key} was dropped as without effect, its gradient has norm {norm}"
                continue
            new = next(iter(mapped))
            found = ours[f"encoder.{new}" if part == "encoder" else new]
        torch.testing.assert_close(
            float(found.norm()), norm, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{name} {key}: {m}"
        )


def check_pangaea(fixture: Fixture) -> None:
    config = fixture.facts["config"]
    described = {}
    for name in config["input_bands"]:
        if f"in.{name}" in fixture.io:
            codes = [config["wavelengths"][name][band] for band in config["input_bands"][name]]
            described[name] = modality(name, codes, config["input_res"])
    sizes = {**config, "block_layernorm_eps": fixture.facts["block_layernorm_eps"]}
    model = model_of(fixture.weights, described, sizes, config["res"])
    layers = {}
    for name in described:
        values = fixture.io[f"in.{name}"]
        values = values[:, None] if values.ndim == 4 else values.transpose(1, 2)
        layers[name] = layer(described[name], values, fixture.io.get(f"in.{name}_dates"))
    count = len(next(iter(fixture.group("in.").values())))
    side = config["input_size"] * config["input_res"] if config["input_size"] else 0.0
    with torch.no_grad():
        tokens = model.tokenize(Batch((Place(side, side),) * count, layers))
        levels = model.levels(tokens, config["output_layers"])
    for depth, level in zip(config["output_layers"], levels, strict=True):
        images = []
        for group in range(len(tokens.groups)):
            mine = level.coords.group == group
            images.append(replace(level, mean=level.mean[mine], coords=level.coords[mine]).grid())
        expected = fixture.io[f"out.{depth}"]
        size = slice(0, expected.shape[2]), slice(0, expected.shape[3])
        close(torch.cat([image[:, :, size[0], size[1]] for image in images], 1), expected, f"block {depth}")


CHECKS: dict[str, Callable[[Fixture], None]] = {"ramen.mae": check_mae, "ramen.pangaea": check_pangaea}
