"""DisCoM-KD: each term against its definition, the script's defect, and that parts hold what they should."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from everysat.objectives.distill import (
    TERMS,
    Disentangling,
    feature_distillation,
    logit_distillation,
    modality_loss,
    orthogonality,
    reverse_gradient,
)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_the_gradient_is_turned_around(strength, generator) -> None:
    x = torch.randn(4, 3, generator=generator, requires_grad=True)
    turned = reverse_gradient(x, strength)
    assert torch.equal(turned, x)
    turned.square().sum().backward()
    torch.testing.assert_close(x.grad, -strength * 2 * x.detach())


def test_the_script_s_targets_tell_no_modality() -> None:
    """A perfect, an undecided and a wrong discriminator, by the right loss and by the released one, which cannot tell the first from the last."""
    modality = torch.tensor([0, 1])
    perfect = torch.tensor([[10.0, 0.0], [0.0, 10.0]])
    for logits, right, released in (
        (perfect, 0.0, 5.0),
        (0 * perfect, math.log(2), math.log(2)),
        (perfect.flip(0), 10.0, 5.0),
    ):
        assert modality_loss(logits, modality).item() == pytest.approx(right, abs=1e-3)
        assert modality_loss(logits, modality, released=True).item() == pytest.approx(released, abs=1e-3)
    one = modality_loss(perfect[:1] * 7, torch.tensor([0]), released=True)
    assert one.item() == 0  # one of the modalities is ignored altogether
    with pytest.raises(ValueError, match="two modalities"):
        modality_loss(torch.zeros(1, 3), torch.tensor([0]), released=True)


def test_orthogonality_is_least_at_right_angles_not_at_opposites() -> None:
    a, right, opposite = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[-3.0, 0.0]])
    assert orthogonality(a, right).item() == 0
    assert orthogonality(a, opposite).item() == pytest.approx(1)
    assert orthogonality(a, opposite, released=True).item() == pytest.approx(-1)


def test_logit_distillation_is_the_divergence_and_is_zero_for_the_teacher(generator) -> None:
    student, teacher = torch.randn(2, 5, 4, generator=generator, requires_grad=True).unbind(0)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    expected = 9 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(logit_distillation(student, teacher, temperature=3.0), expected)
    for multilabel in (False, True):
        assert logit_distillation(teacher, teacher, multilabel=multilabel).item() == pytest.approx(0, abs=1e-6)
        assert logit_distillation(student, teacher, multilabel=multilabel) > 0.01
    with pytest.raises(ValueError, match="temperature=0"):
        logit_distillation(student, teacher, temperature=0)


def test_no_gradient_reaches_a_teacher(generator) -> None:
    student, teacher = (torch.randn(5, 4, generator=generator, requires_grad=True) for _ in range(2))
    (
        logit_distillation(student, teacher)
        + logit_distillation(student, teacher, multilabel=True)
        + feature_distillation(student, teacher)
    ).backward()
    assert teacher.grad is None
    assert student.grad.any()
    assert feature_distillation(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="project the student"):
        feature_distillation(student[:, :2], teacher)


def vectors(generator, counts, width=6):
    given = {n: tuple(torch.randn(2, k, width, generator=generator).unbind(0)) for n, k in counts.items()}
    return given, {n: torch.randint(3, (k,), generator=generator) for n, k in counts.items()}


def test_terms_are_those_of_the_paper(generator) -> None:
    torch.manual_seed(0)
    model = Disentangling(["rgb", "sar"], 6, 3, dim=4, weights={"modality": 0.5}).eval()
    given, labels = vectors(generator, {"rgb": 5, "sar": 5})
    terms = model(given, labels)
    p = {n: model.parts(n, *given[n]) for n in given}
    number = torch.tensor([0] * 5 + [1] * 5)
    cos = F.cosine_similarity
    expected = {
        "task": sum(F.cross_entropy(model.heads[n](torch.cat([p[n].invariant, p[n].informative], 1)), labels[n]) for n in p) / 2,
        "auxiliary": sum(F.cross_entropy(model.auxiliary(x), labels[n]) for n in p for x in (p[n].invariant, p[n].informative)) / 4,
        "modality": (
            F.cross_entropy(model.of_informative(torch.cat([p[n].informative for n in p])), number)
            + F.cross_entropy(model.of_irrelevant(torch.cat([p[n].irrelevant for n in p])), number)
        ) / 2,
        "invariance": F.cross_entropy(model.discriminator(torch.cat([p[n].invariant for n in p])), number),
        "orthogonality": sum(cos(p[n].informative, x).square().mean() for n in p for x in (p[n].irrelevant, p[n].invariant)) / 4,
    }  # fmt: skip
    assert tuple(expected) == TERMS
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach())
    total = sum(0.5 * v if n == "modality" else v for n, v in expected.items())
    torch.testing.assert_close(terms["loss"], total)


def test_the_adversary_learns_what_the_encoder_unlearns(generator) -> None:
    """The discriminator goes down the loss, what it reads goes up."""
    torch.manual_seed(0)
    only = {name: float(name == "invariance") for name in TERMS}
    model = Disentangling(["rgb", "sar"], 6, 3, dim=4, weights=only)
    given, labels = vectors(generator, {"rgb": 30, "sar": 30})
    loss = model(given, labels)["loss"]
    loss.backward()

    def moved(parameters):
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p -= 1e-2 * p.grad
        after = model(given, labels)["loss"].item()
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
        return after

    assert moved(list(model.discriminator.parameters())) < loss.item()
    assert moved(list(model.invariant.parameters())) > loss.item()


def test_unpaired_samples_and_absent_modalities(generator) -> None:
    model = Disentangling(["rgb", "sar", "dem"], 6, 3, dim=4)
    given, labels = vectors(generator, {"rgb": 7, "sar": 4})
    assert torch.isfinite(model(given, labels)["loss"])
    assert model.logits("sar", *given["sar"]).shape == (4, 3)
    contrast = Disentangling(["rgb", "sar", "dem"], 6, 3, dim=4, invariance="contrastive")
    with pytest.raises(ValueError, match="of one place"):
        contrast(given, labels)
    alone = {"rgb": given["rgb"]}
    assert contrast(alone, labels)["invariance"].item() == 0


def test_contrast_pulls_the_same_place_together(generator) -> None:
    torch.manual_seed(0)
    model = Disentangling(["a", "b"], 6, 3, dim=16, invariance="contrastive").eval()
    model.invariant["b"] = model.invariant["a"]
    given, labels = vectors(generator, {"a": 8, "b": 8})
    given["b"] = given["a"]
    same = model(given, labels)["invariance"]
    given["b"] = tuple(x.flip(0) for x in given["a"])
    assert same < model(given, labels)["invariance"]


def test_what_does_not_fit_is_refused(generator) -> None:
    for arguments, error, words in (
        ({"modalities": ["a"]}, ValueError, "two or more"),
        ({"modalities": ["a", "b", "c"], "released": True}, ValueError, "two modalities"),
        ({"invariance": "contrast"}, LookupError, "Did you mean contrastive"),
        ({"weights": {"modal": 1.0}}, LookupError, "Did you mean modality"),
    ):
        with pytest.raises(error, match=words):
            Disentangling(**{"modalities": ["a", "b"], "width": 4, "classes": 2, **arguments})
    model = Disentangling(["rgb", "sar"], 6, 3, dim=4)
    with pytest.raises(LookupError, match="Did you mean sar"):
        model.logits("sat", torch.zeros(2, 6), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="vectors is empty"):
        model({}, {})


def made(places, generator):
    """Two modalities: a class that both see, one that only the first sees, and an offset that tells which modality it is."""
    common, own = torch.randint(2, (2, places), generator=generator)
    x = {}
    for i, name in enumerate(("a", "b")):
        columns = [2 * common - 1, (2 * own - 1) * (i == 0), torch.full((places,), 4 * i - 2)]
        x[name] = torch.stack(columns, 1) + 0.3 * torch.randn(places, 3, generator=generator)
    return x, common + 2 * own


@pytest.fixture(scope="module")
def trained():
    found = {}
    for released in (False, True):
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nets = nn.ModuleDict(
                {n: nn.ModuleList(nn.Sequential(nn.Linear(3, 32), nn.ReLU()) for _ in range(2)) for n in "ab"}
            )
            model = Disentangling(["a", "b"], 32, 4, dim=16, released=released)
        optimizer = torch.optim.Adam([*nets.parameters(), *model.parameters()], lr=3e-3)
        for _ in range(200):
            x, label = made(128, generator)
            loss = model({n: tuple(net(x[n]) for net in nets[n]) for n in "ab"}, {"a": label, "b": label})["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[released] = (nets.eval(), model.eval())
    return found


def told(trained, released, part) -> float:
    """Accuracy of a fresh linear probe that tells the modality from a part."""
    nets, model = trained[released]
    xs = []
    for seed in (5, 6):
        x, _ = made(400, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            xs.append(torch.cat([getattr(model.parts(n, *(net(x[n]) for net in nets[n])), part) for n in "ab"]))
    y = torch.tensor([-1.0] * 400 + [1.0] * 400)
    ones = torch.ones(800, 1)
    weight = torch.linalg.lstsq(torch.cat([xs[0], ones], 1), y[:, None], driver="gelsd").solution
    return float(((torch.cat([xs[1], ones], 1) @ weight)[:, 0].sign() == y).float().mean())


def test_each_modality_runs_alone(trained) -> None:
    nets, model = trained[False]
    x, label = made(1000, torch.Generator().manual_seed(9))
    right = {n: (model.logits(n, *(net(x[n]) for net in nets[n])).argmax(1) == label).float().mean() for n in "ab"}
    assert right["a"] > 0.95
    assert 0.4 < right["b"] < 0.6  # it sees one of the two classes


def test_specific_parts_tell_the_modality(trained) -> None:
    assert told(trained, False, "informative") > 0.95
    assert told(trained, False, "irrelevant") > 0.95
