"""DisCoM-KD: each term against its definition, the script's defect, and that parts hold what they should."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from everysat.nn.distill import (
    TERMS,
    Disentangling,
    Parts,
    feature_distillation,
    logit_distillation,
    modality_loss,
    orthogonality,
    reverse_gradient,
    told_apart,
)
from everysat.nn.probe import fit_linear


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


def made_parts(generator, counts, dim=4):
    return {n: Parts(*torch.rand(3, k, dim, generator=generator).unbind(0)) for n, k in counts.items()}


ZERO = torch.zeros(())


def test_terms_are_those_of_the_paper(generator) -> None:
    torch.manual_seed(0)
    model = Disentangling(["rgb", "sar"], 4, weights={"modality": 0.5})
    p = made_parts(generator, {"rgb": 5, "sar": 5})
    terms = model(p, torch.tensor(2.0), torch.tensor(3.0))
    number = torch.tensor([0] * 5 + [1] * 5)
    cos = F.cosine_similarity
    expected = {
        "task": torch.tensor(2.0),
        "auxiliary": torch.tensor(3.0),
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


@pytest.mark.parametrize("hidden", [0, 16])
def test_the_adversary_learns_what_the_encoder_unlearns(generator, hidden) -> None:
    """The discriminator goes down the loss, what it reads goes up."""
    torch.manual_seed(0)
    only = {name: float(name == "invariance") for name in TERMS}
    model = Disentangling(["rgb", "sar"], 4, weights=only, hidden=hidden)
    net = nn.Linear(6, 4)
    x = torch.randn(60, 6, generator=generator)

    def loss():
        invariant = net(x)
        parts = {n: Parts(*[part] * 3) for n, part in zip(("rgb", "sar"), invariant.chunk(2), strict=True)}
        return model(parts, ZERO, ZERO)["loss"]

    before = loss()
    before.backward()

    def moved(parameters):
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p -= 1e-2 * p.grad
        after = loss().item()
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
        return after

    assert moved(list(model.discriminator.parameters())) < before.item()
    assert moved(list(net.parameters())) > before.item()


def test_unpaired_samples_and_absent_modalities(generator) -> None:
    names = ["rgb", "sar", "dem"]
    parts = made_parts(generator, {"rgb": 7, "sar": 4})
    assert torch.isfinite(Disentangling(names, 4)(parts, ZERO, ZERO)["loss"])
    contrast = Disentangling(names, 4, invariance="contrastive")
    with pytest.raises(ValueError, match="of one place"):
        contrast(parts, ZERO, ZERO)
    assert contrast({"rgb": parts["rgb"]}, ZERO, ZERO)["invariance"].item() == 0


def test_contrast_pulls_the_same_place_together(generator) -> None:
    model = Disentangling(["a", "b"], 16, invariance="contrastive")
    one = Parts(*torch.rand(3, 8, 16, generator=generator).unbind(0))
    same = model({"a": one, "b": one}, ZERO, ZERO)["invariance"]
    turned = one[torch.arange(7, -1, -1)]
    assert same < model({"a": one, "b": turned}, ZERO, ZERO)["invariance"]
    told = torch.stack([torch.arange(8), torch.arange(7, -1, -1)], 1)
    torch.testing.assert_close(model({"a": one, "b": turned}, ZERO, ZERO, told)["invariance"], same)
    alone = torch.cat([told[:3], torch.tensor([[3, -1], [-1, 0]])])
    few = model({"a": one, "b": turned}, ZERO, ZERO, alone)["invariance"]
    torch.testing.assert_close(few, model({"a": one[told[:3, 0]], "b": turned[told[:3, 1]]}, ZERO, ZERO)["invariance"])


def test_what_does_not_fit_is_refused() -> None:
    for arguments, error, words in (
        ({"modalities": ["a"]}, ValueError, "two or more"),
        ({"modalities": ["a", "b", "c"], "released": True}, ValueError, "two modalities"),
        ({"invariance": "contrast"}, LookupError, "Did you mean contrastive"),
        ({"weights": {"modal": 1.0}}, LookupError, "Did you mean modality"),
    ):
        with pytest.raises(error, match=words):
            Disentangling(**{"modalities": ["a", "b"], "dim": 4, **arguments})
    with pytest.raises(ValueError, match="parts is empty"):
        Disentangling(["rgb", "sar"], 4)({}, ZERO, ZERO)


def made(places, generator):
    """Two modalities that see the same two classes, and an offset that tells which modality it is."""
    label = torch.randint(2, (2, places), generator=generator)
    x = {}
    for i, name in enumerate(("a", "b")):
        columns = [*(2 * label - 1), torch.full((places,), 4 * i - 2)]
        x[name] = torch.stack(columns, 1) + 0.3 * torch.randn(places, 3, generator=generator)
    return x, label[0] + 2 * label[1]


def network(dim) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, dim), nn.BatchNorm1d(dim), nn.ReLU())


@pytest.fixture(scope="module")
def trained():
    """Networks and heads of both modalities, after 160 steps, by the kind of the adversary."""
    found = {}
    for invariance in ("adversarial", "solved"):
        generator = torch.Generator().manual_seed(0)
        weights = {"invariance": 1.0 if invariance == "adversarial" else 10.0}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nets = nn.ModuleDict({n: nn.ModuleList([network(16), network(32)]) for n in "ab"})
            heads = nn.ModuleDict({n: nn.Linear(32, 4) for n in "ab"})
            shared = nn.Linear(16, 4)
            model = Disentangling(["a", "b"], 16, invariance=invariance, weights=weights)
        optimizer = torch.optim.Adam([p for part in (nets, heads, shared, model) for p in part.parameters()], lr=3e-3)
        for _ in range(160):
            x, label = made(128, generator)
            p = parts_of(nets, x)
            task = sum(F.cross_entropy(heads[n](p[n].useful), label) for n in p)
            auxiliary = sum(F.cross_entropy(shared(z), label) for n in p for z in (p[n].invariant, p[n].informative))
            loss = model(p, task / 2, auxiliary / 4)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[invariance] = (nets.eval(), heads)
    return found


def parts_of(nets, x) -> dict[str, Parts]:
    return {n: Parts(nets[n][0](x[n]), *nets[n][1](x[n]).chunk(2, -1)) for n in "ab"}


def told(trained, invariance, part) -> float:
    """Share of new samples whose modality a fresh logistic regression on a frozen part tells, of which half are of either."""
    nets, _ = trained[invariance]
    with torch.no_grad():
        said = [parts_of(nets, made(500, torch.Generator().manual_seed(seed))[0]) for seed in (5, 6)]
    x = [torch.cat([getattr(p[n], part) for n in "ab"]) for p in said]
    y = torch.arange(2).repeat_interleave(500)
    probe = fit_linear(x[0], y, torch.arange(1000), classes=("a", "b"), strengths=(1e-3,))
    return float((probe.probabilities(x[1]).argmax(1) == y).float().mean())


@pytest.mark.parametrize("invariance", ["adversarial", "solved"])
def test_each_modality_runs_alone_and_specific_parts_tell_it(trained, invariance) -> None:
    nets, heads = trained[invariance]
    x, label = made(1000, torch.Generator().manual_seed(9))
    p = parts_of(nets, x)
    for n in "ab":
        assert (heads[n](p[n].useful).argmax(1) == label).float().mean() > 0.97
    assert told(trained, invariance, "informative") > 0.95
    assert told(trained, invariance, "irrelevant") > 0.95


def test_the_invariant_part_does_not_tell_the_modality_after_the_adversary_that_is_solved_for(trained) -> None:
    """Against a learned one, which is never at its best, a fresh probe still does."""
    assert told(trained, "solved", "invariant") < 0.75
    assert told(trained, "adversarial", "invariant") > 0.9


def test_the_solved_adversary_explains_what_least_squares_does(generator) -> None:
    x, modality = torch.randn(300, 5, generator=generator), torch.arange(300) % 3
    x[:, 0] += modality
    y = F.one_hot(modality, 3).double()
    y = y - y.mean(0)
    z = (x - x.mean(0)).double()
    residual = y - z @ torch.linalg.lstsq(z, y).solution
    expected = 1 - residual.square().sum() / y.square().sum()
    assert told_apart(x, modality, 3, ridge=1e-9).item() == pytest.approx(float(expected), abs=1e-3)
    assert told_apart(x[:, 1:], modality, 3) < 0.05
    assert told_apart(F.one_hot(modality, 3).float(), modality, 3) > 0.98
    assert told_apart(x[:1], modality[:1], 3) == 0
    moving = x.clone().requires_grad_(True)
    told_apart(moving, modality, 3).backward()
    assert told_apart((moving - 30 * moving.grad).detach(), modality, 3) < told_apart(x, modality, 3)
