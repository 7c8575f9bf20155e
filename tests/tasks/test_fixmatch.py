"""Pseudo-labels: what enters the loss, what does not, where the gradient goes, and that labels of few places reach further."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from simple_encoder import SquareEncoder, image_batch, label_raster

from everysat.nn.mappers import Tasked
from everysat.tasks import classify
from everysat.tasks.fixmatch import Strong, build
from everysat.types import Batch

MILD = {"drop_layers": 0, "drop_dates": 0, "drop_bands": 0, "cut": 0, "shift": 0.3, "noise": 0.1}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return SquareEncoder()


def task_of(encoder, **options):
    torch.manual_seed(1)
    options = {"classes": ["a", "b", "c"], "gsd_m": 10.0, "token_size_m": 20.0, "strong": MILD, **options}
    return build(options.pop("variant", "pixel"), encoder=encoder, **options)


def batch_of(generator, rows=3, side=6, labelled=(0, 1, 2)):
    """Pixels whose class can be read off the first band; labels of some places."""
    index = torch.randint(3, (rows, 1, side, side), generator=generator)
    values = torch.cat([index / 2.0, torch.rand(rows, 1, side, side, generator=generator)], 1)
    label = label_raster(index, 10.0).obs(torch.tensor(labelled, dtype=torch.long))
    return image_batch(values).adding(label=label)


def watched(task, encoder, batch, seed=0):
    """The terms, and the logits of both views with their gradients after a backward pass."""
    kept = []
    handle = task.task.head.register_forward_hook(
        lambda module, inputs, output: (output[0].retain_grad(), kept.append(output))[0]
    )
    terms = task(encoder, batch, torch.Generator().manual_seed(seed))
    handle.remove()
    terms["loss"].backward()
    (logits, seen), n = kept[0], len(batch)
    return terms, logits.detach(), logits.grad, seen, n


def test_what_is_sure_enters_the_loss_and_what_is_not_does_not(encoder, generator):
    batch = batch_of(generator, labelled=[]).without("label")
    terms, logits, grad, _, n = watched(task_of(encoder, threshold=0.01), encoder, batch)
    p = logits[:n].softmax(1)
    confidence, pseudo = p.max(1)
    each = torch.nn.functional.cross_entropy(logits[n:], pseudo, reduction="none")
    torch.testing.assert_close(terms["unlabelled"], each.mean())
    middle = float(confidence.flatten().sort().values[40]) + 1e-6
    terms, _, grad, _, _ = watched(task_of(encoder, threshold=middle, unlabelled_weight=3.0), encoder, batch)
    sure = confidence >= middle
    assert 0 < int(sure.sum()) < sure.numel()
    torch.testing.assert_close(terms["unlabelled"], (each * sure).sum() / sure.numel())
    torch.testing.assert_close(terms["loss"], 3.0 * terms["unlabelled"])
    torch.testing.assert_close(terms["confident"], sure.float().mean())
    assert (grad[n:].abs().sum(1) > 0).eq(sure).all()
    none, _, grad, _, _ = watched(task_of(encoder, threshold=1.0), encoder, batch)
    assert none["loss"] == none["confident"] == 0
    assert not grad.any()


def test_the_gradient_flows_through_the_strong_view_alone(encoder, generator):
    _, _, grad, _, n = watched(task_of(encoder, threshold=0.01), encoder, batch_of(generator, labelled=[]))
    assert not grad[:n].any()
    assert (grad[n:].abs().sum((1, 2, 3)) > 0).all()


def test_labels_are_learnt_from_the_view_as_it_came_and_not_guessed(encoder, generator):
    batch = batch_of(generator, labelled=[0, 1, 2])
    task = task_of(encoder, threshold=0.01)
    terms, _, grad, _, n = watched(task, encoder, batch)
    assert terms["unlabelled"] == 0
    assert not grad[n:].any()
    torch.testing.assert_close(terms["loss"], task.task(encoder, batch, generator)["loss"])
    some, _, grad, _, _ = watched(task, encoder, batch_of(generator, labelled=[1]))
    assert some["labelled"] == 36
    assert (grad[:n].abs().sum((1, 2, 3)) > 0).tolist() == [False, True, False]
    assert (grad[n:].abs().sum((1, 2, 3)) > 0).tolist() == [True, False, True]


def test_pixels_without_a_valid_listed_label_are_unlabelled(encoder, generator):
    batch = batch_of(generator, rows=1, labelled=[0])
    label = batch.raster("label")
    valid, values = torch.ones_like(label.valid), label.values.clone()
    valid[..., :2, :] = False
    values[..., 5, :] = 77
    batch = batch.adding(label=replace(label, values=values, valid=valid))
    terms, _, grad, _, n = watched(task_of(encoder, threshold=0.01), encoder, batch)
    guessed = grad[n:].abs().sum(1)[0] > 0
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:2], expected[5] = True, True
    assert torch.equal(guessed, expected)
    assert terms["labelled"] == 18


def test_places(encoder, generator):
    batch = batch_of(generator, rows=4)
    label = label_raster(torch.tensor([0.0, 2.0]).view(2, 1, 1, 1), 60.0)
    batch = batch.adding(label=label)
    terms, _, grad, _, n = watched(
        task_of(encoder, variant="place", gsd_m=None, token_size_m=None, threshold=0.01), encoder, batch
    )
    assert terms["labelled"] == 2
    assert (grad[:n].abs().sum((1, 2, 3)) > 0).tolist() == [True, True, False, False]
    assert (grad[n:].abs().sum((1, 2, 3)) > 0).tolist() == [False, False, True, True]


def test_what_either_view_did_not_see_is_not_asked_for(encoder, generator):
    batch = batch_of(generator, labelled=[])
    terms, _, grad, seen, n = watched(task_of(encoder, threshold=0.01, strong={**MILD, "cut": 0.7}), encoder, batch)
    assert 0 < int(seen[n:].sum()) < int(seen[:n].sum())
    assert torch.equal(grad[n:].abs().sum(1) > 0, seen[n:])
    assert terms["confident"] == 1


def series(generator, rows=3, dates=5):
    values = torch.rand(rows * dates, 2, 8, 8, generator=generator)
    batch = image_batch(values)
    raster = replace(batch.raster("image"), row=torch.arange(rows).repeat_interleave(dates))
    second = replace(raster, values=raster.values + 1)
    return Batch(batch.places[:rows], {"image": raster, "other": second})


def test_the_strong_view_leaves_out_what_it_says_and_never_all(generator):
    batch = series(generator, rows=40)
    seeds = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    still = Strong(0, 0, 0, 0, 0, 0)(batch, seeds())
    for name in batch.layers:
        assert torch.equal(still.raster(name).values, batch.raster(name).values)
        assert torch.equal(still.raster(name).valid, batch.raster(name).valid)
    layers = Strong(0.6, 0, 0, 0, 0, 0)(batch, seeds())
    there = torch.stack([torch.bincount(r.row, minlength=40) for r in layers.layers.values()])
    assert set(there.flatten().tolist()) == {0, 5}
    assert (there.sum(0) > 0).all()
    dates = Strong(0, 0.8, 0, 0, 0, 0)(batch, seeds()).raster("image")
    count = torch.bincount(dates.row, minlength=40)
    assert count.min() == 1
    assert 1 < count.float().mean() < 2.5
    bands = Strong(0, 0, 0.5, 0, 0, 0)(batch, seeds()).raster("image").valid[:, :, 0, 0].view(40, 5, 2)
    assert (bands == bands[:, :1]).all()
    assert bands.any(2).all()
    assert 0.2 < 1 - bands.float().mean() < 0.45
    cut = Strong(0, 0, 0, 0.5, 0, 0)(batch, seeds())
    hidden = ~cut.raster("image").valid
    assert torch.equal(hidden, ~cut.raster("other").valid)
    assert hidden.view(40, 5, 2, 64).float().mean(3).unique().min() > 0.1
    assert (hidden.view(40, 10, 8, 8) == hidden.view(40, 10, 8, 8)[:, :1]).all()
    moved = Strong(0, 0, 0, 0, 0.5, 0)(batch, seeds()).raster("image").values - batch.raster("image").values
    assert moved.flatten(2).std(2).max() < 1e-5
    assert moved[:, :, 0, 0].std() == pytest.approx(0.5 * batch.raster("image").values.std().item(), rel=0.1)
    noisy = Strong(0, 0, 0, 0, 0, 0.5)(batch, seeds()).raster("image").values - batch.raster("image").values
    assert noisy.std() == pytest.approx(0.5 * batch.raster("image").values.std().item(), rel=0.05)


def test_a_place_draws_the_same_whoever_holds_it(generator, monkeypatch):
    """Two processes with a part of the batch each; the deviation of bands alone is that of the part."""
    batch, strong = series(generator, rows=4), Strong(0.4, 0.4, 0.4, 0.4, 0, 0)
    whole = strong(batch, torch.Generator().manual_seed(3))
    for start in (0, 2):
        part = Batch.cat([batch[i] for i in (start, start + 1)])
        monkeypatch.setattr("everysat.tasks.fixmatch.row_offset", lambda rows, device, first=start: first)
        mine = strong(part, torch.Generator().manual_seed(3))
        for name in ("image", "other"):
            wanted = whole.raster(name).obs((whole.raster(name).row >= start) & (whole.raster(name).row < start + 2))
            assert torch.equal(mine.raster(name).valid, wanted.valid)
            assert torch.equal(mine.raster(name).row + start, wanted.row)


def test_invalid_values_have_no_effect(encoder, generator):
    batch = batch_of(generator, labelled=[0])
    valid = torch.rand(3, 2, 6, 6, generator=generator) > 0.3
    raster = replace(batch.raster("image"), valid=valid)
    task, losses = task_of(encoder, threshold=0.01, strong={}), []
    for wrong in (0.0, 1e6):
        wild = batch.adding(image=replace(raster, values=torch.where(valid, raster.values, wrong)))
        losses.append(task(encoder, wild, torch.Generator().manual_seed(1))["loss"])
    assert torch.equal(*losses)


def two_groups(generator, rows):
    """Places of two classes which one band tells; the other varies as much and says nothing."""
    kind = torch.arange(rows) % 2
    bands = kind + 0.15 * torch.randn(rows, generator=generator), torch.randn(rows, generator=generator)
    return image_batch(torch.stack(bands, 1)[:, :, None, None].expand(-1, -1, 4, 4)), kind


def test_the_unlabelled_teach_what_few_labels_do_not():
    """Four labels leave open which way the border runs; 100 places without say where there is a gap for it."""
    scores = []
    for weight, seed in itertools.product((0.0, 1.0), range(3)):
        generator = torch.Generator().manual_seed(seed)
        few, kind = two_groups(generator, 4)
        few = few.adding(label=label_raster(kind.view(-1, 1, 1, 1), 40.0))
        many, truth = two_groups(generator, 100)
        both, strong = Batch.cat([few, many]), {**MILD, "shift": 0.6}
        torch.manual_seed(seed)
        encoder = SquareEncoder(40.0)
        task = build(
            "place", encoder=encoder, classes=["a", "b"], head="linear", unlabelled_weight=weight, strong=strong
        )
        optimiser = torch.optim.AdamW([*task.parameters(), *encoder.parameters()], lr=0.01)
        for step in range(100):
            terms = task(encoder, both, torch.Generator().manual_seed(step))
            optimiser.zero_grad()
            terms["loss"].backward()
            optimiser.step()
        found = task.predict(encoder.embed(many)).values[:, :, 0, 0].argmax(1)
        scores.append(float((found == truth).float().mean()))
    assert sum(scores[:3]) / 3 < 0.9
    assert min(scores[3:]) > 0.97


def test_it_predicts_as_the_classification_does_and_is_rebuilt(encoder, generator):
    batch = batch_of(generator)
    task = task_of(encoder, threshold=0.6, local=["image"], strong={"cut": 0.2})
    again = build(encoder=encoder, **json.loads(json.dumps(task.config)))
    again.load_state_dict(task.state_dict())
    assert again.strong == task.strong == Strong(cut=0.2)
    plain = task.task.predict(encoder.embed(batch), batch)
    for each in (task, again):
        prediction = each.predict(each.features(encoder, batch), batch)
        assert torch.equal(prediction.values, plain.values)
        for a, b in zip(each.pairs(prediction, batch), task.task.pairs(plain, batch), strict=True):
            assert torch.equal(a, b)
    assert set(task.metrics()) == set(task.task.metrics())
    assert Tasked(encoder, task, 10.0, 20.0, 0.0).probabilistic
    assert isinstance(task.task, classify.Classify)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"unlabelled_weight": -1.0}, "must not be negative"),
        ({"multilabel": True}, "one class each"),
        ({"strong": {"drop_date": 0.2}}, "Did you mean drop_dates"),
        ({"strong": {"cut": 1.0}}, "cut=1.0"),
        ({"hed": "norm"}, "no option 'hed'"),
        ({"weight": [1.0]}, "1 values for 3 classes"),
    ],
)
def test_options_that_do_not_fit_are_refused(encoder, options, message):
    with pytest.raises((ValueError, LookupError, TypeError), match=message):
        task_of(encoder, **options)
