"""Checks of the fixtures of the published AnySat."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import torch
from golden_fixture import Fixture, close
from torch import Tensor

from everysat.hub import AnySat
from everysat.models import anysat
from everysat.nn.attention import RelativeTable, SelfAttention
from everysat.nn.position import Grid, grid_sinusoid
from everysat.objectives import jepa
from everysat.objectives.masks import BlockMasks
from everysat.tasks import classify


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def configured(
    facts: dict[str, Any], weights: dict[str, Tensor], names: list[str], period_days: float | None = None
) -> anysat.AnySat:
    """The encoder with these weights. ``names``: layers in the order of the fixture, which the published student depends on."""
    found = [m[1] for m in (re.match(r"projector_([^.]+)\.", key) for key in weights) if m]
    modalities = {}
    for name in dict.fromkeys([*(n for n in names if n in found), *sorted(found)]):
        modality = {**anysat.MODALITIES[name], "origin": "1970-01-01"}
        count = len(modality["bands"])
        modality |= {"mean": (0.0,) * count, "std": (1.0,) * count}
        if modality["projector"] == "series":
            default = period_days or modality.get("period_days", 367.0)
            modality["period_days"] = float(facts.get("T", {}).get(name, default))
        modalities[name] = modality
    query = next((v for k, v in weights.items() if k.endswith(".attention_heads.Q")), torch.zeros(16, 8))
    config = {key: facts[key] for key in ("dim", "depth", "heads")}
    config |= {"modalities": modalities, "time_heads": query.shape[0], "key_dim": query.shape[1], **anysat.PUBLISHED}
    model = anysat.from_config(config).eval()
    model.load_state_dict(anysat.convert(weights, config))
    return model


def layers(fixture: Fixture, prefix: str = "in.") -> dict[str, Tensor]:
    known = {f"{name}{end}" for name in anysat.MODALITIES for end in ("", "_dates", "_mask")}
    return {key: value for key, value in fixture.group(prefix).items() if key in known}


def named(x: dict[str, Tensor]) -> list[str]:
    return [key for key in x if key in anysat.MODALITIES]


def check_components(fixture: Fixture) -> None:
    for key, expected in fixture.group("out.irpe.bucket_ids.h").items():
        assert torch.equal(Grid(1, 1, int(key), int(key)).buckets(), expected), f"buckets {key}"
    query, table = fixture.io["in.irpe.q"], RelativeTable(fixture.io["in.irpe.q"].shape[-1], first_head=True)
    table.table = torch.nn.Parameter(fixture.io["in.irpe.lookup"])
    bias, side = table(query), int((query.shape[2] - 1) ** 0.5)
    full = bias.gather(-1, Grid(1, 1, side, side).buckets().expand(*bias.shape[:2], -1, -1))
    close(full, fixture.io[f"out.irpe.bias.{side}x{side}"], "relative bias")
    check_positions(fixture)
    check_attention(fixture)
    check_masks(fixture)


def check_positions(fixture: Fixture) -> None:
    for key, expected in fixture.group("out.pos.").items():
        *what, scale_text = re.sub(r"\.grid\d+$", "", key).split(".")
        scale, side = int(scale_text.removeprefix("scale")), int((expected.shape[1] - 1) ** 0.5)
        step = float(scale)
        if what:
            modality = anysat.MODALITIES[what[-1]]
            step = modality["gsd_m"] * modality.get("pixels", 1)
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        code = grid_sinusoid(torch.stack([y, x], -1).reshape(-1, 2) * step, expected.shape[-1])
        close(code, expected[0, 1:], f"position code {key}")
        assert not expected[0, 0].any()


def check_attention(fixture: Fixture) -> None:
    x, weights = fixture.io["in.attn.x"], fixture.group("in.attn.w.")
    outputs = fixture.group("out.attn.")
    differences = {}
    for heads in (h for h in range(1, x.shape[-1] + 1) if x.shape[-1] % h == 0):
        for name, expected in outputs.items():
            attention = SelfAttention(x.shape[-1], heads, across_heads="true" in name)
            attention.load_state_dict(weights)
            differences[name, heads] = (attention(x, None, None) - expected).abs().max().item()
    best = {name: min((d, h) for (n, h), d in differences.items() if n == name) for name in outputs}
    assert len({heads for _, heads in best.values()}) == 1, best  # the fixture does not tell the number of heads
    assert all(difference < 3e-5 for difference, _ in best.values()), best


def check_masks(fixture: Fixture) -> None:
    masks = fixture.group("out.maskcollator.")
    for key, expected in masks.items():
        if found := re.match(r"sizes_(\d+)x(\d+)_", key):
            grid = int(found[1]), int(found[2])
            for step, sizes in enumerate(expected.tolist()):
                g = torch.Generator().manual_seed(step)
                context, targets = BlockMasks()(grid, g, torch.Generator().manual_seed(0))
                rows, columns = targets[0].any(1).sum(), targets[0].any(0).sum()
                assert [int(rows), int(columns)] == sizes[:2]
                assert int(context.any(1).sum()) <= sizes[2]
    shown = masks["enc0_seed0_step0"]
    positions = torch.Generator().manual_seed(0)
    drawn = [BlockMasks()((6, 6), torch.Generator().manual_seed(0), positions) for _ in shown]
    for row, (context, targets) in enumerate(drawn):
        assert torch.nonzero(context.flatten()).flatten()[: shown.shape[1]].tolist() == shown[row].tolist()
        for i, target in enumerate(targets):
            expected = masks[f"pred{i}_seed0_step0"][row]
            assert torch.nonzero(target.flatten()).flatten().tolist() == expected.tolist()


def check_release(fixture: Fixture) -> None:
    facts = fixture.facts.get("config")
    if facts is None:
        beside = fixture.folder / fixture.facts["weights"][0].replace(".weights.safetensors", ".json")
        facts = json.loads(beside.read_text())["config"]
    x = layers(fixture)
    model = AnySat(configured(facts, fixture.weights, named(x)))
    taps: dict[str, Tensor] = {}
    for name, projector in model.model.projectors.items():
        projector.register_forward_hook(lambda _, __, out, name=name: taps.__setitem__(name, out))
    checked = 0
    with torch.no_grad():
        for key, expected in fixture.group("out.patch").items():
            patch_m, output, *layer = key.split(".")
            close(model(x, int(patch_m), output, ".".join(layer)), expected, key)
            checked += 1
    assert checked
    with torch.no_grad():
        for key in (k for k in fixture.group("mid.patch") if ".spatial." in k):
            patch_m, name = int(key.split(".")[0]), key.split(".spatial.")[1]
            small = dict.fromkeys(named(x), 10.0) if set(named(x)) <= {"l7", "alos"} else {}
            view = model.model.at(patch_m=float(patch_m), gsd_m=small)
            tokens = view.tokenize(model._batch(x, named(x), small))
            mine = tokens.coords.group == tokens.groups.index(name)
            close(tokens.x[mine], fixture.io[f"mid.patch{key}"], f"tokens of {name}")


def check_finetune(fixture: Fixture) -> None:
    facts, x = fixture.facts["config"], layers(fixture)
    model = configured(facts, part(fixture.weights, "model."), named(x), period_days=366.0)
    dense = bool(facts["keep_subpatch"])
    patch_m = 10.0 * facts["scale"]
    view = model.at(
        patch_m=patch_m, output="dense" if dense else "patch", dense=facts["modality_keep"] if dense else ""
    )
    classes = [f"class {i}" for i in range(int(facts["n_class"]))]
    options: dict[str, Any] = {"encoder": view, "classes": classes}
    task = (
        classify.build("pixel", gsd_m=10.0, token_size_m=10.0, **options)
        if dense
        else classify.build("place", multilabel=True, **options)
    )
    task.head.head.load_state_dict(part(fixture.weights, "head."))
    logits, _ = task.head(view.embed(AnySat(model)._batch(x, named(x), {})))
    expected = fixture.io["out.logits"]
    close(logits.view_as(expected), expected, "logits")


def check_pretrain(fixture: Fixture) -> None:
    facts = fixture.facts["config"]
    order = facts["datasets"][fixture.facts["dataset"]]
    student = configured(facts, part(fixture.weights, "model.encoder."), order)
    teacher = configured(facts, part(fixture.weights, "target_encoder."), order)
    objective = jepa.build(
        encoder=student,
        depth=facts["predictor"]["depth"],
        heads=facts["predictor"]["heads"],
        tau=facts["tau"],
        modality_ratio=facts["modality_mask_ratio"],
        date_ratio=facts["date_mask_ratio"],
        quirks=["shifted_tokens", "shifted_codes", "shifted_queries"],
    ).eval()
    objective.load_state_dict(
        {
            **jepa.convert(part(fixture.weights, "model.")),
            **{f"teacher.{k}": v for k, v in teacher.state_dict().items()},
        }
    )
    patch_m, call = 10.0 * fixture.facts["scale"], AnySat(student)
    whole = layers(fixture)
    view, teacher = student.at(patch_m=patch_m), objective.teacher.at(patch_m=patch_m)
    goal = teacher(teacher.tokenize(call._batch(whole, order, {})))
    expected = fixture.io["mid.teacher_tokens"]
    close(goal.mean.view_as(expected), expected, "teacher")
    tokens = view.tokenize(call._batch({**whole, **layers(fixture, "mid.kept.")}, order, {}))
    for name in order:
        if f"out.tokens_{name}" in fixture.io:
            mine = tokens.x[tokens.coords.group == tokens.groups.index(name)]
            close(mine.view_as(expected), fixture.io[f"out.tokens_{name}"], f"tokens of {name}")
    draws = drawn(fixture, tokens.memo["context"], expected.shape[1])
    predicted, wanted = objective.predictions(view, tokens, goal, draws)
    for ours, key in ((wanted, "mid.target"), (predicted, "out.predicted_tokens")):
        close(ours.view_as(fixture.io[key]), fixture.io[key], key)
    check_losses(fixture, objective, student, objective.terms(view, tokens, goal, draws))


def drawn(fixture: Fixture, context: Tensor, cells: int) -> jepa.Draws:
    """The draws of the fixture: those of sensors are over the shown patches of the layers that are no context."""
    shown = fixture.io["in.mask_enc"]
    rows, count = shown.shape
    blank = torch.zeros(rows, cells, dtype=torch.bool)
    targets = [blank.scatter(1, mask, True) for _, mask in sorted(fixture.group("in.mask_pred").items())]
    protection, noise = torch.zeros(rows, len(context), cells), torch.ones(rows, len(context), cells)
    for number, group in enumerate(torch.nonzero(~context).flatten().tolist()):
        chosen = (fixture.io["mid.modmask.keep_randint"] == number).float()
        protection[:, group] = protection[:, group].scatter(1, shown, chosen)
        own = fixture.io["mid.modmask.noise_rand"][:, number * count : (number + 1) * count]
        noise[:, group] = noise[:, group].scatter(1, shown, own)
    return jepa.Draws(blank.scatter(1, shown, True), torch.stack(targets), protection, noise)


def check_losses(fixture: Fixture, objective: jepa.Jepa, student: anysat.AnySat, terms: dict[str, Tensor]) -> None:
    names = {"loss": "loss", "mse_loss": "prediction", "contrastive_loss": "contrastive"}
    for name, expected in fixture.group("out.loss.").items():
        close(terms[names[name]], expected, f"loss {name}")
    terms["loss"].backward()
    gradients = {**dict(objective.named_parameters()), **{f"encoder.{k}": p for k, p in student.named_parameters()}}
    for name, expected in fixture.group("grad.").items():
        if name.startswith("encoder."):
            renamed = anysat.convert({name.removeprefix("encoder."): expected}, student.config)
            ours = "encoder." + next(iter(renamed))
        else:
            ours = next(iter(jepa.convert({name: expected})))
        close(gradients[ours].grad, expected, f"gradient of {name}")


CHECKS: dict[str, Callable[[Fixture], None]] = {
    "anysat.components": check_components,
    "anysat.release": check_release,
    "anysat.finetune": check_finetune,
    "anysat.pretrain": check_pretrain,
}
