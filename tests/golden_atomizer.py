"""Checks of the fixtures of the published Atomizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_fixture import Fixture, close
from torch import Tensor, nn
from torch.nn import functional as F

from everysat import sensors
from everysat.models import atomizer
from everysat.nn.atoms import Fourier
from everysat.nn.local import (
    GaussianAttention,
    LocalReading,
    RelativeAttention,
    cartesian_code,
    nearest,
    polar_code,
)
from everysat.nn.perceiver import GatedMlp, LatentAttention, Pooling
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
    pruned = next(key for key in fixture.io if key.startswith("out.logits_pruned")).removeprefix("out.logits")
    share, said = int(pruned.removeprefix("_pruned")) / 100, []
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
            (pruned, model, kept),
            ("june", june, []),
            ("june", june, later),
        ):
            with torch.no_grad():
                states = which.states(atoms, rows, 1, some)
                ours = logits(fixture, which.pooling(states[-1]))[0]
            if not name:
                said.append(ours)
            if name == "june":
                expected = fixture.io[f"out_june.logits{pruned}" if some else "out_june.logits"]
            else:
                expected = fixture.io[f"out.logits{name}"]
                _check_latents(fixture, f"out.latents{name}_layer", sample, states)
            close(ours, expected[sample], f"logits {name} of sample {sample}, {len(some)} prunings")
    loss = F.binary_cross_entropy_with_logits(torch.stack(said), fixture.io["in.labels"])
    close(loss, fixture.io["out.bce_loss"][0], "loss")


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


# --- the later line ------------------------------------------------------------------------------------------------------------


class Later(nn.Module):
    """The unpublished later model, put together from the layers of :mod:`everysat.nn.local`: latents on a grid read tokens of their own,
    talk with regard to distance, and pixels ask the latents nearest to them. Random choices are read from the fixture."""

    def __init__(self, fixture: Fixture) -> None:
        super().__init__()
        self.facts, self.weights = fixture.facts["config"]["Atomiser"], fixture.weights
        c = self.facts
        dim, bands = c["latent_dim"], len(anchors(fixture.facts))
        self.code = Fourier(c["cartesian_max_freq"], c["cartesian_num_bands"])
        self.value = Fourier(c["bandvalue_max_freq"], c["bandvalue_num_freq_bands"])
        context = 3 * self.code.dim + bands + self.value.dim
        cross, inner = (c["cross_heads"], c["cross_dim_head"]), (c["latent_heads"], c["latent_dim_head"])
        turned = {"rotary": c.get("encoder_use_rpe", False)}, {"rotary": c.get("decoder_use_rpe", False)}
        layers = []
        for number in range(c["depth"]):
            p = f"encoder_layers.{number}."
            layers.append(
                nn.ModuleDict(
                    {
                        "norm": filled(nn.LayerNorm(dim), fixture, f"{p}0.norm."),
                        "reading": filled(LocalReading(dim, context, *cross, **turned[0]), fixture, f"{p}0.fn."),
                        "feed": filled(GatedMlp(dim), fixture, f"{p}1."),
                        "own_norm": filled(nn.LayerNorm(dim), fixture, f"{p}2.0.0.norm."),
                        "own": filled(self._attention(dim, *inner), fixture, f"{p}2.0.0."),
                        "own_feed": filled(GatedMlp(dim), fixture, f"{p}2.0.1."),
                    }
                )
            )
        self.layers = nn.ModuleList(layers)
        decoder = LocalReading(bands, dim + 3 * self.code.dim, *cross, out=dim, **turned[1])
        self.decoder = filled(decoder, fixture, "decoder_cross_attn.")
        state = {k.replace("cross.", "").replace("to_out.0.", "to_out."): v for k, v in fixture.weights.items()}
        state["to_logits.0.to_kv.weight"] = torch.cat([state[f"to_logits.0.to_{part}.weight"] for part in "kv"])
        state |= {f"to_logits.0.norm.{k}": state[f"to_logits.1.{k}"] for k in ("weight", "bias")}
        self.pooling = Pooling(dim, *inner)
        self.pooling.load_state_dict({k: state[f"to_logits.0.{k}"] for k in self.pooling.state_dict()})

    def _attention(self, dim: int, heads: int, head_dim: int) -> nn.Module:
        if self.facts.get("use_gaussian_bias"):
            return GaussianAttention(dim, heads, head_dim)
        if self.facts.get("use_rpe"):
            return RelativeAttention(dim, heads, head_dim, code=Fourier(16, 16), unit=51.0)
        return LatentAttention(dim, heads, head_dim)

    def centres(self, tokens: Tensor) -> Tensor:
        """Where tokens lie: columns 1 and 2 are numbers in a table, which is all zeros in the fixtures."""
        return self.weights["input_processor.geometry.token_centers_lookup"][tokens[..., 1:3].long()]

    def spectral(self, tokens: Tensor) -> Tensor:
        prefix = "input_processor.spectral_encoder."
        book = self.weights[prefix + "physics_codebook"].clone()
        book[self.weights[prefix + "learnable_idx_map"]] = self.weights[prefix + "learned_embeddings"]
        return book[tokens[..., 3].long()]

    def relative(self, offset: Tensor, extent: float) -> Tensor:
        unit = extent / (self.facts["spatial_latents"] - 1)
        polar = self.facts["position_encoding_type"] == "POLAR"
        log_size = torch.log(torch.full(offset.shape[:-1], self.facts["gsd"] / self.facts["G_ref"]))
        return (polar_code if polar else cartesian_code)(offset / unit, log_size, self.code)

    def read(self, layer: Any, x: Tensor, tokens: Tensor, masked: Tensor, at: Tensor) -> Tensor:
        """Latents after one layer; ``tokens`` [place, latent, token, 6] are those that each reads."""
        offset = self.centres(tokens) - at[:, :, None]
        image_m = 28 * self.facts["gsd"]  # the smaller of the two images that the code knows
        context = torch.cat([self.relative(offset, image_m), self.spectral(tokens), self.value(tokens[..., 0])], -1)
        placed, others = x.split([at.shape[1], x.shape[1] - at.shape[1]], 1)
        flat = (t.flatten(0, 1) for t in (layer["norm"](placed), context, ~masked, offset))
        placed = layer["feed"](placed + layer["reading"](*flat).view_as(placed))
        x = torch.cat([placed, others], 1)
        own = layer["own"]
        x = own(x) if isinstance(own, LatentAttention) else x + own(layer["own_norm"](x), at)
        return layer["own_feed"](x)

    def decode(self, x: Tensor, queries: Tensor, at: Tensor) -> Tensor:
        """What the pixels ``queries`` read, with what they ask for behind it."""
        where = self.centres(queries)
        near = nearest(where, at, self.facts["decoder_k_spatial"])
        row = torch.arange(len(x))[:, None, None]
        offset = at[row, near] - where[:, :, None]
        context = torch.cat([x[row, near], self.relative(offset, self.facts["latent_surface"])], -1)
        asked = self.spectral(queries)
        read = self.decoder(asked.flatten(0, 1), context.flatten(0, 1), None, offset.flatten(0, 1))
        return torch.cat([read.unflatten(0, asked.shape[:2]), asked], -1)


def filled(module: nn.Module, fixture: Fixture, prefix: str) -> Any:
    """The module with its weights, found in the fixture by the end of their names."""
    state = {}
    for key, value in fixture.weights.items():
        if key.startswith(prefix):
            state[key.removeprefix(prefix).removeprefix("fn.").replace("to_out.0.", "to_out.")] = value
    module.load_state_dict({key: state[key] for key in module.state_dict()})
    return module


def predicted_error(placed: Tensor, weights: dict[str, Tensor]) -> Tensor:
    steps = {"0": False, "1": True, "3": True, "5": False}
    return F.softplus(sequence(placed, weights, "gravity_displacement.error_predictor.mlp.", steps))[..., 0]


def output(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    steps = {"0": False, "1": True, "3": False, "4": True, "6": False}
    return sequence(x, weights, "output_head.", steps)


def sequence(x: Tensor, weights: dict[str, Tensor], prefix: str, steps: dict[str, bool]) -> Tensor:
    """Linear maps and layer norms (which have vectors for weights) by their numbers, with GELU behind those marked."""
    for number, gelu in steps.items():
        weight, bias = weights[f"{prefix}{number}.weight"], weights[f"{prefix}{number}.bias"]
        x = F.layer_norm(x, x.shape[-1:], weight, bias) if weight.ndim == 1 else F.linear(x, weight, bias)
        x = F.gelu(x) if gelu else x
    return x


def chosen(fixture: Fixture) -> list[Tensor]:
    """Numbers of the tokens [place, latent, token] that each layer reads: a choice per latent, then the same part of it for all."""
    order = fixture.facts["rng_order"]
    places, count = len(fixture.io["in.tokens"]), fixture.facts["config"]["Atomiser"]["geo_m_val"]
    found = []
    for number, kind in enumerate(order):
        if kind == "multinomial":
            some = fixture.io[f"rng.{number}.multinomial"]
            if some.shape[1] > count:
                some = some[:, fixture.io[f"rng.{number + 1}.randperm"][:count]]
            found.append(some.view(places, -1, count))
    return found


def moved(at: Tensor, error: Tensor, facts: dict[str, Any]) -> Tensor:
    """Where latents go: towards those of large predicted error, by a force that falls with the square of the distance, then away from
    crowds. (Latents closer than half the spacing also push each other away; in the fixtures none are.)"""
    spacing, edge = facts["latent_surface"] / (facts["spatial_latents"] - 1), facts["latent_surface"] / 2
    error = torch.log1p(error)
    low, high = error.amin(1, keepdim=True), error.amax(1, keepdim=True)
    error = (error - low) / (high - low + 1e-8)
    step = at[:, None] - at[:, :, None]
    distance = step.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    assert torch.where(distance > 1e-6, distance, spacing).min() > spacing / 2
    force = ((error - error.mean(1, keepdim=True))[:, None, :, None] * step / distance**3).sum(2)
    size = force.norm(dim=-1, keepdim=True)
    share = (size / size.mean(1, keepdim=True)).clamp(max=2) / 2
    reach = facts["min_displacement"] + (facts["max_displacement"] - facts["min_displacement"]) * share
    start = at = (at + force / size.clamp(min=1e-8) * reach).clamp(-edge, edge)
    for _ in range(3):
        step = at[:, :, None] - at[:, None]
        crowd = torch.exp(-step.square().sum(-1, keepdim=True) / (2 * (spacing / 2) ** 2))
        push = 0.1 * spacing * (1 - error)[..., None] * (crowd * step).sum(2) / (spacing / 2)
        at = at + capped(push, spacing / 4)
        at = (start + capped(at - start, spacing / 2)).clamp(-edge, edge)
    return at


def capped(x: Tensor, most: float) -> Tensor:
    return x * (most / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)).clamp(max=1)


def check_head(fixture: Fixture) -> None:
    model, io = Later(fixture).eval(), fixture.io
    weights, tokens, masked = fixture.weights, io["in.tokens"], io["in.mask"].view(len(io["in.tokens"]), -1) > 0
    at = weights["input_processor.geometry.latent_grid"][io["rng.0.randperm"]].expand(len(tokens), -1, -1)
    content = weights["spatial_latent_content"].expand(len(tokens), at.shape[1], -1)
    x = torch.cat([content, weights["global_latents"].expand(len(tokens), -1, -1)], 1)
    row = torch.arange(len(tokens))[:, None, None]
    with torch.no_grad():
        for number, (layer, some) in enumerate(zip(model.layers, chosen(fixture), strict=True)):
            close(at, io[f"out.coords{number}"], f"places of the latents of layer {number}")
            x = model.read(layer, x, tokens[row, some], masked[row, some], at)
            error = io.get(f"out.predicted_error{number}")
            if error is not None:  # a layer that moves: latents begin anew elsewhere
                close(predicted_error(x[:, : at.shape[1]], weights), error, f"predicted error of layer {number}")
                at, x = moved(at, error, model.facts), torch.cat([content, x[:, at.shape[1] :]], 1)
        close(at, io["out.final_coords"], "places of the latents at the end")
        close(x, io["out.latents"], "latents")
        close(logits(fixture, model.pooling(x)), io["out.logits"], "logits")
        read = model.decode(x, io["in.queries"], at)
        predictions = output(read, weights)
        close(predictions, io["out.predictions"], "predictions")
    close(F.mse_loss(predictions[..., 0], io["in.queries"][..., 0]), io["out.mse_loss"][0], "loss")


CHECKS: dict[str, Callable[[Fixture], None]] = {"atomizer.bmvc": check_bmvc, "atomizer.head": check_head}
