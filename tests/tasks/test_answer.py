"""Answers to questions: what they may depend on, that they are learned, saved, calibrated, and refused."""

from __future__ import annotations

import math

import pytest
import torch
from simple_encoder import SquareEncoder, image_batch

from everysat.find import find
from everysat.models import weights
from everysat.nn.gaussian import Gaussian
from everysat.nn.questions import observed
from everysat.tasks import answer
from everysat.types import Batch, ContractError, Features, Place, Raster, Text

ANSWERS = {"presence": ["yes", "no"], "area": ["0 %", "some", "most"], "count": ["0", "1", "2"]}
ASKED = (
    ("Is there any water?", "presence"),
    ("Is there a forest?", "presence"),
    ("How much of it is water?", "area"),
    ("What share is forest?", "area"),
)


def task_on(encoder, **options):
    """With a text encoder that counts letters."""
    torch.manual_seed(0)
    return answer.build(encoder=encoder, answers=ANSWERS, words="letters", vector=26, width=16, **options)


def texts(rows, questions, kinds=None, answers=None) -> dict[str, Text]:
    row = torch.tensor(rows)
    columns = {"questions": (questions, "question"), "types": (kinds, "type"), "answers": (answers, "answer")}
    return {
        name: Text(tuple(some), (role,) * len(some), row) for name, (some, role) in columns.items() if some is not None
    }


def places(n: int = 8, seed: int = 0) -> Batch:
    """Where the first band is high there is water, where the second is, forest; as large a share as the place is high."""
    generator = torch.Generator().manual_seed(seed)
    values = 0.1 * torch.rand(n, 2, 6, 6, generator=generator)
    rows, questions, kinds, answers = [], [], [], []
    for i in range(n):
        for band, (one, share) in enumerate(((ASKED[0], ASKED[2]), (ASKED[1], ASKED[3]))):
            side = int(torch.randint(3, (), generator=generator)) * 3
            values[i, band, :side] += 1.0
            rows += [i, i]
            questions += [one[0], share[0]]
            kinds += ["presence", "area"]
            answers += ["yes" if side else "no", ("0 %", "some", "most")[side // 3]]
    return image_batch(values).adding(**texts(rows, questions, kinds, answers))


def chances(task, encoder, batch) -> torch.Tensor:
    """Probabilities [question, answer]."""
    with torch.no_grad():
        return task.eval().predict(task.features(encoder.eval(), batch), batch).values[..., 0, 0]


def place(encoder, seed: int) -> Batch:
    """One that any encoder takes, 80 m wide."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for name, wanted in encoder.inputs.items():
        n = round(80 / wanted.gsd_m)
        values = torch.rand(2, len(wanted.sensor.bands), n, n, generator=generator)
        raster = Raster.of(wanted.sensor, values, wanted.gsd_m, time_s=torch.tensor([[0.0, 1.0], [1e6, 1e6 + 1]]))
        layers[name] = raster if wanted.dated else raster.obs(torch.tensor([0]))
    return Batch((Place(80.0, 80.0),), layers)


def learned(steps: int = 70, **options):
    torch.manual_seed(0)
    encoder = SquareEncoder(dim=12)
    task = task_on(encoder, dropout=0.0, **options)
    adam = torch.optim.Adam([*encoder.parameters(), *task.parameters()], 5e-3)
    for step in range(steps):
        adam.zero_grad()
        task.train()(encoder.train(), places(16, seed=step), torch.Generator())["loss"].backward()
        adam.step()
    return encoder.eval(), task.eval()


@pytest.fixture(scope="module")
def trained():
    encoder, task = learned()
    with torch.no_grad():
        task(encoder, places(64, seed=1000), torch.Generator())  # validation
    return encoder, task


def scores(encoder, task, batch) -> dict[str, float]:
    metrics = task.metrics()
    pairs = task.pairs(task.predict(task.features(encoder, batch), batch), batch)
    for metric in metrics.values():
        metric.update(*pairs)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def test_it_learns_what_cannot_be_guessed(trained) -> None:
    encoder, task = trained
    found = scores(encoder, task, places(64, seed=2000))
    assert found["accuracy"] > 0.95
    assert found["accuracy_presence"] > 0.95
    assert found["blind_accuracy"] < 0.65
    assert found["type_accuracy"] == 1.0
    assert math.isnan(found["accuracy_count"])
    assert found["mean_of_types"] == pytest.approx((found["accuracy_presence"] + found["accuracy_area"]) / 2)


def test_blind_ignores_pixels_and_the_other_does_not(trained) -> None:
    batch, other = places(3), places(3, seed=5)
    asked = {name: batch.layers[name] for name in ("questions", "types")}
    again = other.adding(**asked).without("answers")
    encoder, task = trained
    assert not torch.allclose(chances(task, encoder, batch), chances(task, encoder, again), atol=1e-2)
    blind = task_on(encoder, blind=True)
    torch.testing.assert_close(chances(blind, encoder, batch), chances(blind, encoder, again), rtol=0, atol=0)
    terms = blind.train()(encoder, batch, torch.Generator())
    terms["loss"].backward()
    assert "answer" not in terms


def test_what_is_masked_changes_nothing(trained) -> None:
    encoder, task = trained
    batch = places(2)
    raster = batch.raster("image")
    seen = torch.ones_like(raster.valid)
    seen[:, :, :2] = False
    made = [
        batch.adding(image=Raster(raster.sensor, torch.where(seen, raster.values, fill), seen, raster.time_s, raster.row, 10.0))
        for fill in (0.0, 1e6, math.nan)
    ]  # fmt: skip
    for other in made[1:]:
        torch.testing.assert_close(chances(task, encoder, made[0]), chances(task, encoder, other), rtol=0, atol=0)
    assert not torch.equal(chances(task, encoder, batch), chances(task, encoder, made[0]))


def test_two_in_a_batch_are_one_by_one(trained) -> None:
    encoder, task = trained
    small = image_batch(torch.rand(1, 2, 4, 4)).adding(**texts([0], [ASKED[0][0]], ["presence"], ["yes"]))
    batch = Batch.cat([small, places(2)])
    alone = torch.cat([chances(task, encoder, batch[i]) for i in range(3)])
    torch.testing.assert_close(chances(task, encoder, batch), alone, rtol=1e-5, atol=1e-6)
    losses = [float(task(encoder, batch[i], torch.Generator())["answer"].detach()) for i in range(3)]
    weight = torch.bincount(batch.layers["questions"].row).double()
    together = float(task(encoder, batch, torch.Generator())["answer"].detach())
    assert together == pytest.approx(float((torch.tensor(losses).double() * weight).sum() / weight.sum()), rel=1e-4)


def test_the_order_of_questions_is_irrelevant(trained) -> None:
    encoder, task = trained
    batch = places(3)
    turned = batch.adding(
        **{n: batch.layers[n].obs(torch.arange(11, -1, -1)) for n in ("questions", "types", "answers")}
    )
    torch.testing.assert_close(
        chances(task, encoder, turned).flip(0), chances(task, encoder, batch), rtol=1e-5, atol=1e-6
    )
    questions = [question for question, _ in ASKED]
    forth, back = (task.ask(encoder, batch[0], some) for some in (questions, questions[::-1]))
    assert [r.said for r in forth] == [r.said for r in back[::-1]]


def test_probabilities_are_of_the_answers_of_the_type(trained) -> None:
    encoder, task = trained
    batch = places(2)
    prediction = task.predict(task.features(encoder, batch), batch)
    assert prediction.sensor.names[:3] == ("presence: yes", "presence: no", "area: 0 %")
    assert prediction.values.shape == (8, 8, 1, 1)
    assert prediction.row.equal(batch.layers["questions"].row)
    torch.testing.assert_close(prediction.values.sum((1, 2, 3)), torch.ones(8))
    assert not prediction.values[~prediction.valid].any()
    free = batch.without("types", "answers")  # the type is read from the question
    torch.testing.assert_close(chances(task, encoder, free), chances(task, encoder, batch))


def test_nothing_observed_says_so(trained) -> None:
    encoder, task = trained
    batch = image_batch(torch.rand(2, 2, 6, 6))
    raster = batch.raster("image")
    valid = raster.valid.clone()
    valid[0] = False
    dark = batch.adding(image=Raster(raster.sensor, raster.values, valid, raster.time_s, raster.row, 10.0))
    unseen, seen = task.ask(encoder, dark, [ASKED[0][0]])
    assert (unseen.said, unseen.answer, unseen.probability, unseen.sure, unseen.observed) == ("nothing observed", "", 0.0, False, False)  # fmt: skip
    assert unseen.guess in ("yes", "no")
    assert seen.observed
    assert seen.answer in ("yes", "no")
    asked = dark.adding(**texts([0, 1], [ASKED[0][0]] * 2, ["presence"] * 2, ["yes"] * 2))
    assert len(task.pairs(task.predict(task.features(encoder, asked), asked), asked)[1]) == 1


def test_a_place_without_cells_may_be_known_by_its_summary() -> None:
    where = image_batch(torch.rand(2, 2, 2, 2)).places
    nothing = SquareEncoder().embed(
        image_batch(torch.rand(2, 2, 2, 2), valid=torch.zeros(2, 2, 2, 2, dtype=torch.bool))
    )
    known = Gaussian(torch.zeros(2, 6), torch.tensor([0.0, -1.0])[:, None].expand(2, 6), torch.tensor([False, True]))
    features = Features(nothing.mean, nothing.coords, known.mean, where, nothing.mean, known.var)
    assert observed(features).tolist() == [False, True]
    assert observed(nothing).tolist() == [False, False]


def test_below_the_threshold_it_is_not_sure(trained) -> None:
    encoder, task = trained
    batch = places(1)
    (reply,) = task.ask(encoder, batch, [ASKED[0][0]])
    assert reply.kind == "presence"
    assert reply.said == reply.answer
    (picky,) = task.ask(encoder, batch, [ASKED[0][0]], sure=1.0)
    assert picky.said == ("not sure" if picky.probability < 1 else picky.answer)
    assert (picky.answer, picky.probability) == (reply.answer, reply.probability)


def test_temperatures_fit_the_validation_questions(trained) -> None:
    encoder, task = trained
    assert torch.isfinite(task.temperatures()).all()
    fresh = task_on(encoder)
    assert fresh.temperatures().tolist() == [1.0] * 3
    with torch.no_grad():
        for parameter in fresh.reader.out[-1].parameters():
            parameter.mul_(30)  # sure of what it knows nothing of
        batch = places(64, seed=7)
        sharp = chances(fresh, encoder, batch).amax(1).mean()
        fresh.eval()(encoder, batch, torch.Generator())
    assert (fresh.temperatures()[:2] > 4).all()
    assert chances(fresh, encoder, batch).amax(1).mean() < sharp - 0.1
    fresh.train()(encoder, batch, torch.Generator())  # other weights follow
    assert fresh.temperatures().tolist() == [1.0] * 3


def test_unknown_kinds_are_named(trained) -> None:
    encoder, task = trained
    assert task.learned == ("presence", "area")
    with pytest.raises(LookupError, match=r"'zzzz zzzz\?': no kind of question .* It learned presence, area"):
        task.ask(encoder, places(1), [ASKED[0][0], "zzzz zzzz?"])
    with pytest.raises(LookupError, match="has learned no questions yet"):
        task_on(encoder).ask(encoder, places(1), [ASKED[0][0]])
    with pytest.raises(ValueError, match="questions is empty"):
        task.ask(encoder, places(1), [])
    with pytest.raises(TypeError, match="is one string"):
        task.ask(encoder, places(1), "Is there any water?")


def test_unlisted_answers_and_batches_without_questions_teach_nothing() -> None:
    encoder = SquareEncoder()
    task = task_on(encoder).train()
    odd = image_batch(torch.rand(1, 2, 4, 4)).adding(
        **texts([0, 0], ["How?", "Why?"], ["presence", "cause"], ["maybe", "yes"])
    )
    for batch in (odd, odd.without("questions", "types", "answers")):
        terms = task(encoder, batch, torch.Generator())
        assert float(terms["labelled"].detach()) == 0
        assert float(terms["answer"].detach()) == 0
        terms["loss"].backward()
    assert not task.counts.any()


def test_gradients_reach_every_parameter() -> None:
    encoder = SquareEncoder()
    task = task_on(encoder).train()
    task(encoder, places(4), torch.Generator())["loss"].backward()
    missing = [
        n for n, p in (*encoder.named_parameters(), *task.named_parameters()) if p.grad is None or not p.grad.any()
    ]
    assert not missing or missing == ["reader.key.bias"], missing  # the same for all cells, cancels in the softmax


def test_saved_and_loaded_it_answers_alike(tmp_path) -> None:
    encoder = find("models", "simplesat/nano")[0].build("nano")
    task = task_on(encoder).train()
    batch = Batch.cat(
        [place(encoder, seed).adding(**texts([0], [q], [k], [ANSWERS[k][0]])) for seed, (q, k) in enumerate(ASKED)]
    )
    adam = torch.optim.Adam(task.kind.parameters(), 0.1)
    for _ in range(40):  # else no kind of question is known
        adam.zero_grad()
        task(encoder, batch, torch.Generator())["type"].backward()
        adam.step()
    with torch.no_grad():
        task.eval()(encoder.eval(), batch, torch.Generator())
    path = weights.save(tmp_path / "a.safetensors", encoder, task)
    again = weights.load_task(path)
    questions = [question for question, _ in ASKED]
    assert again[1].ask(again[0], batch[0], questions) == task.ask(encoder, batch[0], questions)
    assert again[1].learned == task.learned == ("presence", "area")
    assert again[1].temperatures().equal(task.temperatures())


def test_mistakes(trained) -> None:
    encoder, task = trained
    with pytest.raises(ValueError, match=r"answers=\{\} must list the answers"):
        answer.build(encoder=encoder, answers={})
    with pytest.raises(ValueError, match=r"answers of presence: .* must be strings; put quotes"):
        answer.build(encoder=encoder, answers={"presence": [True, False]})
    with pytest.raises(ValueError, match="must be two or more different ones"):
        answer.build(encoder=encoder, answers={"presence": ["yes"]})
    with pytest.raises(ValueError, match="width=10 must be a multiple of heads=4"):
        answer.build(encoder=encoder, answers=ANSWERS, width=10)
    with pytest.raises(LookupError, match="no variant 'free'"):
        answer.build("free", encoder=encoder, answers=ANSWERS)
    with pytest.raises(ValueError, match="sure=2 must lie between"):
        task_on(encoder, sure=2)
    batch = places(1)
    with pytest.raises(LookupError, match="has answers but no text layer 'questions'"):
        task.asked(batch.without("questions"))
    with pytest.raises(ValueError, match="layer 'types' must be a text for each"):
        task.asked(batch.adding(types=batch.layers["types"].obs(torch.tensor([0]))))
    with pytest.raises(ValueError, match="batch is missing"):
        task.predict(task.features(encoder, batch))
    wrong = answer.build(encoder=encoder, answers=ANSWERS, words="letters", vector=27)
    with pytest.raises(ContractError, match="gives vectors of 26 numbers, the task was made for 27"):
        wrong.asked(batch)


def test_a_model_that_answers_makes_no_map() -> None:
    from everysat.polygons import task_mapper
    from everysat.types import ContractError

    with pytest.raises(ContractError, match="everysat ask"):
        task_mapper(encoder := SquareEncoder(), task_on(encoder))
