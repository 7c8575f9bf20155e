"""AnySat's pre-training: what is hidden, who learns, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everysat.data import synthetic
from everysat.models import anysat
from everysat.objectives import jepa
from everysat.objectives.masks import fewer_dates
from everysat.recipe import Recipe
from everysat.train import train
from everysat.types import Batch, Place

SERIES = ("optical", "radar")


def modalities() -> dict[str, dict]:
    """The layers of the synthetic set ``three``, as an AnySat reads them."""
    found = {}
    for name, layer in synthetic.VARIANTS["three"].items():
        sensor = layer.sensor(name)
        table = {"name": sensor.name, "kind": sensor.kind, "source": "synthetic"}
        table["bands"] = [
            {"name": b.name, "gsd_m": b.gsd_m, "unit": b.unit, "range": list(b.range)} for b in sensor.bands
        ]
        dated = layer.dates[1] > 0
        level, spread = (-10.0, 5.0) if layer.kind == "sar" else (0.4, 0.2)
        found[name] = {
            "sensor": table,
            "bands": [b.name for b in sensor.bands],
            "gsd_m": layer.gsd_m,
            "projector": "series" if dated else "image",
            "pixels": 1 if dated else 4,
            "mean": [level] * layer.bands,
            "std": [spread] * layer.bands,
        }
    return found


@pytest.fixture
def encoder() -> anysat.AnySat:
    torch.manual_seed(0)
    return anysat.build("", dim=64, depth=1, heads=4, patch_m=10.0, dropout=0.0, modalities=modalities())


def places(*indices: int, **options) -> Batch:
    data = synthetic.build("three", **options)
    return Batch.cat([data[i] for i in indices])


def objective(encoder: anysat.AnySat, **options) -> jepa.Jepa:
    torch.manual_seed(1)
    return jepa.build(encoder=encoder, depth=1, heads=4, **options)


def test_the_generator_decides_everything(encoder) -> None:
    task, batch = objective(encoder, patch_m=[10, 20]).eval(), places(0, 1)
    encoder.eval()
    a, b, c = (task(encoder, batch, torch.Generator().manual_seed(s))["loss"] for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_student_learns_and_the_teacher_follows(encoder) -> None:
    task, batch = objective(encoder), places(0, 1)
    task(encoder, batch, torch.Generator().manual_seed(0))["loss"].backward()
    learns = {n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.split(".")[0] for n in learns} == {"projectors", "spatial", "class_token", "blocks", "cross"}
    assert all(p.grad is None for p in task.teacher.parameters())
    assert task.mask_token.grad is not None
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 1.0
    before = {n: p.clone() for n, p in task.teacher.named_parameters()}
    task.after_step(encoder, 0, 11)
    for name, parameter in task.teacher.named_parameters():
        torch.testing.assert_close(
            parameter, before[name] + 0.004 * (dict(encoder.named_parameters())[name] - before[name])
        )
    before = {n: p.clone() for n, p in task.teacher.named_parameters()}
    task.after_step(encoder, 10, 11)  # at the last step the teacher stands still
    assert all(torch.equal(p, before[n]) for n, p in task.teacher.named_parameters())


def test_a_place_draws_the_same_whatever_batch_it_is_in(encoder) -> None:
    task, both = objective(encoder), places(0, 1)
    second = both[1]
    together = fewer_dates(both, SERIES, 0.5, torch.Generator().manual_seed(3), 0)
    alone = fewer_dates(second, SERIES, 0.5, torch.Generator().manual_seed(3), 1)
    for name in ("optical", "radar"):
        layer = together.raster(name)
        assert torch.equal(layer.time_s[layer.row == 1], alone.raster(name).time_s)
    draws = [
        task._draws(encoder.tokenize(b), 10.0, torch.Generator().manual_seed(3), first)
        for b, first in ((both, 0), (second, 1))
    ]
    assert torch.equal(draws[0].context[1], draws[1].context[0])
    assert torch.equal(draws[0].noise[1], draws[1].noise[0])


def test_half_of_the_dates_stay_and_at_least_one() -> None:
    batch = places(*range(6))
    fewer = fewer_dates(batch, SERIES, 0.5, torch.Generator().manual_seed(0), 0)
    for name in ("optical", "radar"):
        before, after = (torch.bincount(b.raster(name).row, minlength=6) for b in (batch, fewer))
        assert torch.equal(after, (before // 2).clamp(min=1))
        assert set(map(tuple, fewer.raster(name).time_s.tolist())) <= set(
            map(tuple, batch.raster(name).time_s.tolist())
        )
    assert fewer.raster("vhr") is batch.raster("vhr")


def test_of_every_shown_patch_a_sensor_stays(encoder) -> None:
    task, batch = objective(encoder, modality_ratio=0.9), places(0, 1, 2)
    tokens = encoder.tokenize(batch)
    draws = task._draws(tokens, 10.0, torch.Generator().manual_seed(0), 0)
    shown = task._shown(encoder, tokens, draws)
    hidden = task._hidden(shown, draws)
    cell = shown.coords.row * 36 + shown.coords.cells()[:, 0] * 6 + shown.coords.cells()[:, 1]
    assert hidden.any()
    assert set(cell[~hidden].tolist()) == set(cell.tolist())
    assert draws.context[shown.coords.row, cell % 36].all()


def test_hidden_patches_do_not_reach_the_student(encoder) -> None:
    """What the targets hold changes what is wanted, not what is predicted."""
    task, batch = objective(encoder, contrastive=0.0).eval(), places(0)
    encoder.eval()
    tokens = encoder.tokenize(batch)
    draws = task._draws(tokens, 10.0, torch.Generator().manual_seed(0), 0)
    goal = task.teacher.eval()(task.teacher.tokenize(batch))
    outside = ~draws.context[tokens.coords.row, tokens.coords.cells()[:, 0] * 6 + tokens.coords.cells()[:, 1]]
    other = replace(tokens, x=torch.where(outside[:, None], 9.0, tokens.x))
    a, wanted = task.predictions(encoder, tokens, goal, draws)
    b, _ = task.predictions(encoder, other, goal, draws)
    assert torch.equal(a, b)
    assert len(a) == len(wanted) == int(draws.targets.sum())


def test_places_of_other_sizes_and_without_data_do_no_harm(encoder) -> None:
    small, large = places(0, size_m=40.0), places(1, size_m=60.0)
    batch = Batch.cat([small, Batch((Place(60.0, 60.0),)), large, large.only("vhr")])
    terms = objective(encoder)(encoder, batch, torch.Generator().manual_seed(0))
    assert torch.isfinite(terms["loss"])


def test_it_learns_from_two_sources_at_their_own_patch_sizes(tmp_path) -> None:
    recipe = Recipe.parse(
        {
            "name": "two",
            "model": {
                "name": "anysat/",
                "options": {
                    "dim": 64,
                    "depth": 1,
                    "heads": 4,
                    "patch_m": 10,
                    "dropout": 0.0,
                    "modalities": modalities(),
                },
            },
            "data": [
                {"name": "synthetic", "options": {"places": 16}, "label": "small"},
                {"name": "synthetic", "options": {"places": 16, "size_m": 120.0, "seed": 1}, "label": "large"},
            ],
            "objective": {
                "name": "jepa",
                "options": {"patch_m": {"small": [10], "large": [20, 40]}, "depth": 1, "heads": 4},
            },
            "steps": 40,
            "batch_size": 8,
            "lr": 1e-3,
            "out": str(tmp_path),
        }
    )
    run = train(recipe, quiet=True)
    sizes = {name: {row["patch_m"] for row in run.log if f"loss_{name}" in row} for name in ("small", "large")}
    assert sizes == {"small": {10.0}, "large": {20.0, 40.0}}
    for name in sizes:
        losses = [row["prediction"] for row in run.log if f"loss_{name}" in row]
        assert sum(losses[-4:]) / 4 < 0.5 * losses[0]
    assert run.log[-1]["contrastive"] < run.log[0]["contrastive"]
    # What is saved and returned is the teacher.
    assert isinstance(run.objective, jepa.Jepa)
    for name, tensor in run.objective.teacher.state_dict().items():
        assert torch.equal(tensor, run.encoder.state_dict()[name])
    assert train(recipe, quiet=True).encoder.state_dict().keys() == run.encoder.state_dict().keys()


@pytest.mark.parametrize(
    "options",
    [{"targets": "batch", "centred": True}, {"contrastive": 0.0}, {"negatives": "other_images"}, {"fused": True}],
)
def test_other_choices_of_the_losses(encoder, options) -> None:
    terms = objective(encoder, **options)(encoder, places(0, 1), torch.Generator().manual_seed(0))
    assert torch.isfinite(terms["loss"])
    assert ("contrastive" in terms) == (options.get("contrastive") != 0.0)


def test_targets_of_a_batch_are_standardised(encoder) -> None:
    goal = 5.0 + 3.0 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    found = objective(encoder, targets="batch")._normalised(goal)
    torch.testing.assert_close(found.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(8), atol=1e-4, rtol=0)


def test_unfit_options_are_refused(encoder) -> None:
    with pytest.raises(ValueError, match="date_ratio"):
        objective(encoder, date_ratio=1.0)
    with pytest.raises(ValueError, match="output"):
        objective(encoder.at(output="dense"))
    with pytest.raises(LookupError, match="variants"):
        jepa.build("x", encoder=encoder)
    task = objective(encoder, patch_m={"a": [10]})
    with pytest.raises(LookupError, match="patch_m lists a"):
        task(encoder, places(0), torch.Generator())
