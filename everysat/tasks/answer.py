"""Answers to questions about places: is there water, how much of it is forest, is it rural or urban.

A question is a vector of a frozen text encoder (:mod:`everysat.nn.minilm`). It conditions what is read from the features of any encoder (FiLM, Perez et al. 2018):
each cell of the place, then their mean (shares of the ground), what attention picks among them (is there any), and the summary of the place. One of the
answers of its type is chosen, as RSVQA does (Lobry et al. 2020, doi:10.1109/TGRS.2020.2988782); counts are classes of numbers. The type is told by a text
layer while training, and is read from the question otherwise.

Many answers can be guessed from the question. So the same network also learns to answer with the image hidden: its guess stands beside every answer and
score. ``blind: true`` never shows the image. Probabilities are calibrated by a temperature per type, the one that fits the validation questions best
(Guo et al. 2017); an answer of a lower probability than ``sure`` is "not sure".

The batch has text layers ``questions``, ``answers`` and ``types`` in the same order, as :mod:`everysat.data.rsvqa` and :mod:`everysat.collect.asked` make them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from everysat.nn.minilm import checked, text_encoder
from everysat.nn.questions import Reader, observed
from everysat.sensors import Band, Sensor
from everysat.types import ALWAYS, Batch, ContractError, Encoder, Features, Raster, Task, Text

DEFINITIONS = {
    "accuracy": "share of the questions with a listed answer, about places that were observed, whose most probable answer is right",
    "mean_of_types": "accuracy of each type of question, mean over the types that were asked",
    "blind_accuracy": "accuracy of the same network without the image: what can be guessed from the question",
    "blind_mean_of_types": "the same, mean over the types that were asked",
    "type_accuracy": "share of the questions whose type is read from the question as it was told",
}
"""What the metrics of this module mean; ``accuracy_<type>`` is the accuracy of one type."""
TEMPERATURES = torch.logspace(-2, 3, 41, base=2.0, dtype=torch.float64)
"""Among which the one of a type is chosen."""
FEW = 30
"""Types with fewer validation questions share one temperature."""
EXAMPLES = 256
"""Questions that are remembered, to tell what is unlike all of them."""
NEW = 0.97
"""Largest cosine of one with those before it."""
OTHER = (
    "What is the weather like?", "When was this image taken?", "Who lives here?", "Which country is this?", "What colour are the roofs?",
    "How tall are the trees?", "How old are the buildings?", "Why is it so dark?", "What is the temperature?", "Where is the nearest town?",
    "What is the name of this river?", "How deep is the water?", "How much does the land cost?", "Who are you?", "Tell me a joke.",
)  # fmt: skip
"""Of no type, whatever types there are."""


@dataclass(frozen=True)
class Reply:
    """An answer: ``kind`` of question, ``probability`` that ``answer`` is right, and whether that is ``sure`` enough. ``guess``: the answer to the same question
    without the image. ``row``: the place; without an observation of it (``observed``) there is no answer (empty), but still a guess."""

    question: str
    kind: str
    answer: str
    probability: float
    sure: bool
    guess: str
    guess_probability: float
    observed: bool
    row: int = 0

    @property
    def said(self) -> str:
        """The answer in words."""
        if not self.observed:
            return "nothing observed"
        return self.answer if self.sure else "not sure"


@dataclass(frozen=True)
class Asked:
    """Questions of a batch: ``strings``, their ``vector`` [question, width], place ``row``, ``kind`` as told and ``label`` [question]; -1 where not told or not
    listed."""

    strings: tuple[str, ...]
    vector: Tensor
    row: Tensor
    kind: Tensor
    label: Tensor


class Answer(Task):
    """See :func:`build`. ``types`` are the types of questions, ``names`` all answers as (type, answer)."""

    kind_of: Tensor
    counts: Tensor
    examples: Tensor
    remembered: Tensor
    misfit: Tensor
    tried: Tensor
    side: Tensor

    def __init__(self, encoder: Encoder, config: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.target = config, config["target"]
        self.types = tuple(config["answers"])
        self.names = tuple((kind, answer) for kind, some in config["answers"].items() for answer in some)
        self._index = {name: number for number, name in enumerate(self.names)}
        bands = tuple(Band(f"{kind}: {answer}", 1.0, "probability", range=(0.0, 1.0)) for kind, answer in self.names)
        self.sensor = Sensor(f"{self.target}-probability", "classes", bands, source="predicted")
        sizes = (config["vector"], config["width"], config["heads"], len(self.names), config["dropout"])
        self.reader = Reader(encoder.dim, *sizes)
        self.kind = nn.Sequential(
            nn.LayerNorm(config["vector"]), nn.Linear(config["vector"], len(self.types) + 1)
        )  # the last is none of them
        codes = [self.types.index(kind) for kind, _ in self.names]
        self.register_buffer("kind_of", torch.tensor(codes), persistent=False)
        self.register_buffer("counts", torch.zeros(len(self.names), dtype=torch.int64))
        self.register_buffer("examples", torch.zeros(EXAMPLES, config["vector"]))
        self.register_buffer("side", torch.zeros(1))
        self.register_buffer("remembered", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("misfit", torch.zeros(len(self.types), len(TEMPERATURES), dtype=torch.float64))
        self.register_buffer("tried", torch.zeros(len(self.types), dtype=torch.float64))

    # --- training -----------------------------------------------------------------------------------------------------

    def features(self, encoder: Encoder, batch: Batch) -> Features:
        """The encoder's features of all that is no question, answer or type."""
        return encoder(encoder.tokenize(batch.without(*(self.config[name] for name in ("question", "target", "kind")))))

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropies of the answer among those of its type with and without the image, and of the type. In eval mode, the temperatures are fitted."""
        asked = self.asked(batch)
        known = asked.label >= 0
        vector, row, label = asked.vector[known], asked.row[known], asked.label[known]
        kind = self.kind_of[label]
        features = None if self.config["blind"] else self.features(encoder, batch)
        guessed = self._masked(self.reader(None, vector, row), kind)
        terms = {"blind": _cross_entropy(guessed, label), "type": self._kinds_loss(vector, kind)}
        loss = terms["blind"]
        if features is not None:
            logits = self._masked(self.reader(features, vector, row), kind)
            terms["answer"] = _cross_entropy(logits, label)
            loss = terms["answer"] + self.config["guess"] * terms["blind"]
        self._note(guessed if features is None else logits, vector, kind, label)
        if self.training:
            self.side.fill_(min(batch.width_m, batch.height_m))
        labelled = loss.new_tensor(float(len(label)))
        return {"loss": loss + self.config["type_weight"] * terms["type"], **terms, "labelled": labelled}

    def _kinds_loss(self, vector: Tensor, kind: Tensor) -> Tensor:
        other = self._vectors((*OTHER, *self.config["unlike"]))
        none = torch.full((len(other),), len(self.types), device=kind.device)
        # Half of it is of questions of no type, which are few.
        return (_cross_entropy(self.kind(vector), kind) + _cross_entropy(self.kind(other), none)) / 2

    @torch.no_grad()
    def _note(self, logits: Tensor, vector: Tensor, kind: Tensor, label: Tensor) -> None:
        """What was learned from, in training; in validation, how well each temperature fits."""
        if not self.training:
            scaled = logits.double()[:, None] / TEMPERATURES.to(logits.device)[:, None]
            each = -scaled.log_softmax(-1).gather(2, label[:, None, None].expand(-1, len(TEMPERATURES), 1))[..., 0]
            self.misfit.index_add_(0, kind, each)
            self.tried.index_add_(0, kind, torch.ones_like(kind, dtype=torch.float64))
            return
        self.misfit.zero_(), self.tried.zero_()  # of other weights
        self.counts.index_add_(0, label, torch.ones_like(label))
        known = self.examples[: int(self.remembered)]
        fresh = vector[(vector @ known.T).amax(1) < NEW] if len(known) else vector
        for one in fresh:  # many at first, then hardly any
            count = int(self.remembered)
            if count < EXAMPLES and (count == 0 or float((self.examples[:count] @ one).max()) < NEW):
                self.examples[count] = one
                self.remembered += 1

    # --- prediction ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, features: Features, batch: Batch | None = None) -> Raster:
        """Calibrated probabilities of the answers to the questions of ``batch``: an observation for each question in their order, of the place that it is
        about, one pixel as large as the place, one band per answer. Valid are the answers of its type, where the place was observed."""
        if batch is None:
            raise ValueError("batch is missing: it holds the questions")
        asked = self.asked(batch)
        kind, values = self._chances(None if self.config["blind"] else features, asked)
        seen = (kind[:, None] == self.kind_of) & observed(features)[asked.row, None]
        size_m = max(max(place.height_m, place.width_m) for place in batch.places)
        times = torch.tensor([ALWAYS], dtype=torch.float64, device=values.device).expand(len(values), 2)
        return Raster(self.sensor, values[..., None, None], seen[..., None, None], times, asked.row, size_m)

    def _chances(self, features: Features | None, asked: Asked) -> tuple[Tensor, Tensor]:
        """Type [question], as told or as read, and probabilities [question, answer] of which those of other types are 0."""
        kind = torch.where(asked.kind >= 0, asked.kind, self._kinds(asked.vector)[:, :-1].argmax(1))
        logits = self._masked(self.reader(features, asked.vector, asked.row), kind)
        warm = self.temperatures().to(logits) if features is not None or self.config["blind"] else logits.new_ones(1)
        return kind, (logits / warm.expand(len(self.types))[kind, None]).softmax(-1)

    def _kinds(self, vector: Tensor) -> Tensor:
        """Probabilities [question, type], the last of none of them; types that were never learned have none."""
        learned = torch.zeros(len(self.types) + 1, dtype=torch.bool, device=vector.device)
        learned[self.kind_of[self.counts > 0]] = True
        learned[-1] = True
        everything = not bool(self.counts.any())
        return self.kind(vector).masked_fill(~(learned | everything), -torch.inf).softmax(-1)

    def temperatures(self) -> Tensor:
        """Of each type, by the validation questions; 1 where there were none."""
        misfit, tried = self.misfit, self.tried
        if not tried.any():
            return torch.ones(len(self.types), dtype=torch.float64, device=tried.device)
        enough = torch.where((tried >= FEW)[:, None], misfit, misfit.sum(0))
        return TEMPERATURES.to(tried.device)[enough.argmin(1)]

    @torch.no_grad()
    def ask(
        self, encoder: Encoder, batch: Batch, questions: Sequence[str], *, sure: float | None = None
    ) -> tuple[Reply, ...]:
        """Answers to questions, each about each place of the batch; place by place. ``sure``: least probability of an answer, as trained by default.

        Raises:
            LookupError: a question is of no kind that was learned; the message names these. ValueError: no question, or a blank one.
        """
        checked(questions)
        if not questions:
            raise ValueError("questions is empty: ask something")
        self._refuse_unknown(questions)
        strings = tuple(questions) * len(batch)
        row = torch.arange(len(batch)).repeat_interleave(len(questions))
        free = batch.without(*(self.config[name] for name in ("question", "target", "kind")))
        free = free.adding(**{self.config["question"]: Text(strings, ("question",) * len(strings), row)})
        free = free.to(self.counts.device)
        training = encoder.training, self.training
        try:
            features = self.eval().features(encoder.eval(), free)
            prediction, (kinds, guesses) = self.predict(features, free), self._chances(None, self.asked(free))
        finally:
            encoder.train(training[0]), self.train(training[1])
        chance, seen = prediction.values[..., 0, 0], prediction.valid.flatten(1).any(1)
        limit = self.config["sure"] if sure is None else sure
        replies = []
        for i, string in enumerate(strings):
            best, guess = int(chance[i].argmax()), int(guesses[i].argmax())
            p = float(chance[i, best]) if seen[i] else 0.0
            answer = self.names[best][1] if seen[i] else ""
            told = (self.names[guess][1], float(guesses[i, guess]))
            replies.append(
                Reply(string, self.types[int(kinds[i])], answer, p, p >= limit, *told, bool(seen[i]), int(row[i]))
            )
        return tuple(replies)

    @property
    def side_m(self) -> float:
        """Side of the places that were learned from, metres; 0 before."""
        return float(self.side)

    @property
    def learned(self) -> tuple[str, ...]:
        """Types of which questions were learned."""
        codes = set(self.kind_of[self.counts > 0].tolist())
        return tuple(name for code, name in enumerate(self.types) if code in codes)

    def _refuse_unknown(self, questions: Sequence[str]) -> None:
        if not int(self.remembered):
            raise LookupError("this model has learned no questions yet: train it, as everysat finetune ask_berlin does")
        vector = self._vectors(questions)
        near = (vector @ self.examples[: int(self.remembered)].T).amax(1)
        strange = (near < self.config["familiar"]) | (self._kinds(vector).argmax(1) == len(self.types))
        if strange.any():
            which = ", ".join(repr(q) for q, bad in zip(questions, strange.tolist(), strict=True) if bad)
            raise LookupError(
                f"{which}: no kind of question that this model learned. It learned {', '.join(self.learned)}; ask in the words of "
                "its training questions, such as 'Is there ...?'"
            )

    # --- questions of a batch ---------------------------------------------------------------------------------------

    def asked(self, batch: Batch) -> Asked:
        """The questions of a batch. A question of a type that is not listed is none of this task, and is left to be read.

        Raises:
            LookupError: the batch has no questions, where it has answers. ValueError: layers of different lengths.
        """
        question, answer, kind = (batch.layers.get(self.config[name]) for name in ("question", "target", "kind"))
        device = self.counts.device
        if not isinstance(question, Text):
            if answer is not None:
                raise LookupError(f"the batch has answers but no text layer {self.config['question']!r}")
            question = Text((), (), torch.zeros(0, dtype=torch.int64))
        told = {}
        for name, layer in (("target", answer), ("kind", kind)):
            if layer is not None and (not isinstance(layer, Text) or len(layer.strings) != len(question.strings)):
                raise ValueError(
                    f"layer {self.config[name]!r} must be a text for each of the questions, in their order"
                )
            told[name] = layer.strings if isinstance(layer, Text) else ("",) * len(question.strings)
        codes = [self.types.index(name) if name in self.types else -1 for name in told["kind"]]
        labels = [self._index.get(pair, -1) for pair in zip(told["kind"], told["target"], strict=True)]
        return Asked(
            question.strings, self._vectors(question.strings), question.row.to(device), torch.tensor(codes, dtype=torch.int64, device=device),
            torch.tensor(labels, dtype=torch.int64, device=device),
        )  # fmt: skip

    def _vectors(self, strings: Sequence[str]) -> Tensor:
        width = self.config["vector"]
        if not strings:
            return self.examples.new_zeros(0, width)
        encoder = text_encoder(self.config["words"])
        if encoder.dim != width:
            raise ContractError(
                f"text encoder {self.config['words']!r} gives vectors of {encoder.dim} numbers, the task was made for {width}: set vector"
            )
        return encoder(strings).to(self.examples)

    def _masked(self, logits: Tensor, kind: Tensor) -> Tensor:
        return logits.masked_fill(kind[:, None] != self.kind_of, -torch.inf)

    # --- metrics -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        """What ``metrics()`` are updated with, of questions with a listed answer about places that were observed: [n, 3, answer], probabilities of answers, those
        without the image, and the probability of its type as read; and the label [n]."""
        asked = self.asked(batch)
        known = (asked.label >= 0) & prediction.valid.flatten(1).any(1)
        _, guess = self._chances(None, asked)
        read = self._kinds(asked.vector)[:, self.kind_of]
        return torch.stack([prediction.values[..., 0, 0], guess, read], 1)[known], asked.label[known]

    def metrics(self) -> Mapping[str, Any]:
        each = {f"accuracy_{name}": Answered("accuracy", self.kind_of, code) for code, name in enumerate(self.types)}
        return {name: Answered(name, self.kind_of) for name in DEFINITIONS} | each


class Answered(Metric):
    """One of :data:`DEFINITIONS`, of all questions or of those of the type ``only``, from what :meth:`Answer.pairs` gives. NaN where nothing was asked."""

    full_state_update = False
    right: Tensor
    whole: Tensor

    def __init__(self, score: str, kind_of: Tensor, only: int | None = None) -> None:
        super().__init__()
        self.score, self.only, self.kind_of = score, only, kind_of
        self.part = 2 if score == "type_accuracy" else int(score.startswith("blind"))
        for name in ("right", "whole"):
            self.add_state(name, torch.zeros(int(kind_of.max()) + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chances: Tensor, label: Tensor) -> None:
        said, kinds = chances[:, self.part].argmax(1).cpu(), self.kind_of.cpu()
        true = kinds[label.cpu()]
        right = kinds[said] == true if self.part == 2 else said == label.cpu()
        self.right += torch.bincount(true, right.double(), minlength=len(self.right)).to(self.right)
        self.whole += torch.bincount(true, minlength=len(self.whole)).to(self.whole)

    def compute(self) -> Tensor:
        if self.only is not None:
            return self.right[self.only] / self.whole[self.only]
        if self.score.endswith("mean_of_types"):
            asked = self.whole > 0
            return (self.right[asked] / self.whole[asked]).mean()
        return self.right.sum() / self.whole.sum()


def build(
    variant: str = "",
    *,
    encoder: Encoder,
    answers: Mapping[str, Sequence[str]],
    blind: bool = False,
    width: int = 64,
    heads: int = 4,
    dropout: float = 0.1,
    sure: float = 0.6,
    familiar: float = 0.5,
    guess: float = 0.5,
    type_weight: float = 0.2,
    unlike: Sequence[str] = (),
    words: str = "minilm",
    vector: int = 384,
    question: str = "questions",
    target: str = "answers",
    kind: str = "types",
) -> Answer:
    """Question answering on ``encoder``.

    Args:
        answers: all answers by type of question, such as ``{"presence": ["yes", "no"]}``; questions with other answers are not learned from.
        blind: never show the image.
        width, heads, dropout: of the network.
        sure: least probability of an answer that is given. familiar: least cosine with a training question of one that is answered.
        guess: weight of answering without the image. type_weight: of reading the type of a question.
        unlike: questions of no type, beside :data:`OTHER`.
        words, vector: the text encoder, see :func:`everysat.nn.minilm.text_encoder`, and the length of its vectors.
        question, target, kind: names of the text layers.

    Raises:
        LookupError, ValueError: the options do not fit; the message says which.
    """
    if variant:
        raise LookupError(f"task answer has no variant {variant!r}")
    if not isinstance(answers, Mapping) or not answers:
        raise ValueError(f"answers={answers!r} must list the answers of each type, as {{presence: [yes, no]}}")
    for name, some in answers.items():
        if isinstance(some, str) or len(some) < 2 or len(set(some)) < len(some):
            raise ValueError(f"answers of {name}: {some!r} must be two or more different ones")
        if not all(isinstance(one, str) for one in some):
            raise ValueError(
                f"answers of {name}: {some!r} must be strings; put quotes around numbers, yes and no in YAML"
            )
    if width < 1 or heads < 1 or width % heads:
        raise ValueError(f"width={width} must be a multiple of heads={heads}")
    for option, value in {"sure": sure, "familiar": familiar}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{option}={value} must lie between 0 and 1")
    if min(guess, type_weight) < 0 or not 0 <= dropout < 1:
        raise ValueError(f"guess={guess} and type_weight={type_weight} must not be negative, dropout={dropout} below 1")
    config = {
        "answers": {str(name): list(some) for name, some in answers.items()}, "blind": blind, "width": width, "heads": heads,
        "dropout": dropout, "sure": sure, "familiar": familiar, "guess": guess, "type_weight": type_weight, "unlike": list(unlike),
        "words": words, "vector": vector, "question": question, "target": target, "kind": kind,
    }  # fmt: skip
    return Answer(encoder, config)


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over questions; 0 of none."""
    return F.cross_entropy(logits, label) if len(label) else logits.nan_to_num(0, 0, 0).sum() * 0
