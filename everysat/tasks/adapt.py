"""Classification moved to another sensor: a labelled source, few labels of the target, and many target places without.

SHeDD (Dantas, Gaetano and Ienco, ECML-PKDD 2024, arXiv:2406.14087). Each domain has an encoder of its own (:mod:`everysat.models.domains`), nothing is paired. Six
losses: the class is told from the invariant halves of labelled places of both domains by one classifier that they share; the domain is told from the specific
halves; both halves are orthogonal; pseudo-labels of unlabelled target places, where one is sure enough, have to be given by a strong view too (FixMatch); and the
domain and orthogonality losses of both views of these. Weights are averaged over steps by the recipe's ``ema``.

Different here from the released script, unless ``released``: the strong view is one (layers, dates, bands and a square are left out, values are disturbed; the
script's change of colours has default arguments, which change nothing, so that its views differ by flips and quarter turns), and the cosine of both halves is
squared (the script's goes down to -1 where features are not all positive); and running statistics of batch normalisation are of weak views alone. Left out of ``released``: that weights are averaged once an epoch, from the 50th.

Variants, to compare with: ``source_target`` has no unlabelled places, ``fixmatch`` no source, ``target_only`` neither. Places that a variant does not use are
not looked at. One class a place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everysat.find import suggest
from everysat.nn.distill import orthogonality
from everysat.nn.draws import uniform
from everysat.nn.gather import world
from everysat.nn.heads import PlaceHead
from everysat.tasks import classify
from everysat.tasks.classify import Classify
from everysat.tasks.fixmatch import Strong
from everysat.types import Batch, Encoder, Features, Layer, Raster, Task

TERMS = ("task", "domain", "orthogonality", "pseudo")
VARIANTS = {
    "shedd": ("source", "labelled", "unlabelled"),
    "source_target": ("source", "labelled"),
    "fixmatch": ("labelled", "unlabelled"),
    "target_only": ("labelled",),
}
"""Which places each variant learns from."""
DOMAINS = ("source", "target")
STRONG = Strong(drop_layers=0.0, drop_dates=0.3, drop_bands=0.1, cut=0.3, shift=0.3, noise=0.2)


class Adapt(Task):
    """See :func:`build`. ``learned`` is how large a share of unlabelled places was surely of each class in recent steps, [class]."""

    learned: Tensor

    def __init__(self, task: Classify, dim: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.task, self.config = task, {**task.config, **config}
        self.target, self.sensor = task.target, task.sensor
        self.uses = VARIANTS[config["variant"]]
        self.weights = {**dict.fromkeys(TERMS, 1.0), **config["weights"]}
        self.strong = None if config["released"] else Strong(**config["strong"])
        self.domain = nn.Linear(dim, len(DOMAINS))
        self.register_buffer("learned", torch.zeros(len(task.names)))

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        domains = self._domains(encoder)
        index, known = self._labels(batch)
        logits, truth, halves = [], [], []
        costs: dict[str, list[Tensor]] = {name: [] for name in TERMS}
        if "source" in self.uses:
            row, part = domains.part(batch, "source", known)
            if len(row):
                seen = domains.one("source").halves(part)
                logits.append(self._logits(seen.invariant))
                truth.append(index[row])
                halves.append((seen.invariant, seen.specific, 0))
        row, part = domains.part(batch, "target", None if "unlabelled" in self.uses else known)
        free = ~known[row]
        guessed = domains.part(batch, "target", ~known)[1] if free.any() else part
        if len(part):
            one = domains.one("target")
            seen = one.halves(part)
            said, invariant, specific = self._logits(seen.invariant), seen.invariant, seen.specific
            logits.append(said[~free])
            truth.append(index[row][~free])
            halves.append((invariant[~free], specific[~free], 1))
            if free.any():
                with contextlib.nullcontext() if self.config["released"] else still(one):
                    strong = one.halves(self.strong_view(guessed, generator))
                costs["pseudo"] = [self._pseudo(said[free], self._logits(strong.invariant))]
                views = [
                    torch.cat(views)
                    for views in zip(
                        (invariant[free], specific[free]), (strong.invariant, strong.specific), strict=True
                    )
                ]
                self._disentangle([(views[0], views[1], 1)], costs)
        chosen, labels = torch.cat([_none(self), *logits]), torch.cat([index[:0], *truth])
        weight = {} if self.task.weight is None else {"weight": self.task.weight}
        costs["task"].append(self.task.loss(chosen, labels, **weight))
        self._disentangle(halves, costs)
        return self._told(costs, float(len(labels)))

    def _told(self, costs: Mapping[str, list[Tensor]], labelled: float) -> dict[str, Tensor]:
        zero = self.domain.weight.sum() * 0
        terms = {name: torch.stack([zero, *each]).sum() for name, each in costs.items()}
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        facts = {"labelled": zero.new_tensor(labelled), "confident": self.learned.sum()}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}, **facts}

    def _disentangle(self, halves: list[tuple[Tensor, Tensor, int]], costs: dict[str, list[Tensor]]) -> None:
        """Adds what domains cost that are not told apart by the specific halves, and halves that say the same; where there is no source there are no domains."""
        halves = [one for one in halves if len(one[0])]
        if "source" not in self.uses or not halves:
            return
        specific = torch.cat([one[1] for one in halves])
        number = torch.cat([torch.full((len(s),), d, device=s.device) for _, s, d in halves])
        costs["domain"].append(F.cross_entropy(self.domain(specific), number))
        invariant = torch.cat([one[0] for one in halves])
        costs["orthogonality"].append(orthogonality(invariant, specific, released=self.config["released"]))

    def _pseudo(self, weak: Tensor, strong: Tensor) -> Tensor:
        """Cross-entropy of the strong view against the class of the weak one, where that is sure; the others count as 0."""
        confidence, pseudo = weak.detach().float().softmax(1).max(1)
        sure = confidence >= self.config["threshold"]
        if self.training:
            share = F.one_hot(pseudo[sure], len(self.learned)).sum(0) / len(pseudo)
            self.learned.lerp_(share.to(self.learned), 1 - self.config["memory"])
        if self.config["adaptive"]:
            sure = confidence >= self.thresholds()[pseudo]
        return (F.cross_entropy(strong.float(), pseudo, reduction="none") * sure).mean()

    def thresholds(self) -> Tensor:
        """Least probability of each class that makes it a pseudo-label, [class]. ``adaptive``: of classes that are learned slowly less is asked, in the manner of
        FlexMatch (Zhang et al. 2021, eq. 5 to 8), with shares among recent places in place of counts over all."""
        tau = self.config["threshold"]
        if not self.config["adaptive"]:
            return torch.full_like(self.learned, tau)
        most = torch.maximum(self.learned.max(), 1 - self.learned.sum())
        share = self.learned / most.clamp(min=1e-9)
        return tau * share / (2 - share)

    def strong_view(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Of the target's places by themselves; flips and quarter turns, where images are square and of one size, and :class:`Strong`."""
        batch = turned(batch, generator)
        return batch if self.strong is None else self.strong(batch, generator)

    def features(self, encoder: Encoder, batch: Batch) -> Features:
        return self.task.features(encoder, batch)

    @torch.no_grad()
    def predict(self, features: Features, batch: Batch | None = None) -> Raster:
        """Probabilities, one band per class."""
        return self.task.predict(features, batch)

    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        """As the classification's; nothing of a batch without the target layer."""
        if self.target not in batch.layers:
            return prediction.values.new_zeros(0, prediction.values.shape[1]), self.task.codes[:0]
        return self.task.pairs(prediction, batch)

    def metrics(self) -> Mapping[str, Any]:
        return self.task.metrics()

    def _logits(self, invariant: Tensor) -> Tensor:
        head = self.task.head
        assert isinstance(head, PlaceHead)
        said: Tensor = head.head(invariant)
        return said

    def _labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The number of the class of each place, int64 [row], and whether it has one, bool [row]."""
        codes = self.task.codes
        index, known = codes.new_zeros(len(batch)), torch.zeros(len(batch), dtype=torch.bool, device=codes.device)
        if self.target in batch.layers:
            label = batch.raster(self.target)
            found, listed = self.task._index(label.values[:, 0, 0, 0])
            index[label.row] = found
            known[label.row] = listed & label.valid[:, 0, 0, 0]
        return index, known

    def _domains(self, encoder: Encoder) -> Any:
        if world()[1] > 1:
            raise ValueError("adaptation runs in one process: parts of a batch may lack a domain. Set devices: 1")
        lacking = [
            name for name in DOMAINS if name in ("target", *self.uses) and name not in getattr(encoder, "names", ())
        ]
        if lacking or not hasattr(encoder, "halves"):
            raise ValueError(
                f"adaptation ({self.config['variant']}) needs an encoder for {' and '.join(lacking or DOMAINS)}, the model is {encoder.family!r}: take the model "
                "domains with modalities: data, and data of both domains"
            )
        return encoder


def build(
    variant: str = "shedd",
    *,
    encoder: Encoder,
    threshold: float = 0.95,
    adaptive: bool = False,
    memory: float = 0.9,
    strong: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    released: bool = False,
    head: str = "linear",
    **options: Any,
) -> Adapt:
    """A classifier of places of the target.

    Args:
        variant: one of :data:`VARIANTS`.
        encoder: of :mod:`everysat.models.domains`; one domain's is enough to predict.
        threshold: least probability of a class that makes it a pseudo-label; with ``adaptive`` of the class that is learned best, see
            :meth:`Adapt.thresholds`, over about 1 / (1 - ``memory``) steps.
        strong: changes of :data:`STRONG`. weights: of :data:`TERMS`, 1 where not given.
        released: the released script's losses, see the module's text.
        head, options: those of classification, for one class each.

    Raises:
        ValueError, LookupError, TypeError: the options do not fit together; the message says which.
    """
    variant = variant or "shedd"
    if variant not in VARIANTS:
        raise LookupError(f"adapt has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    if not 0 < threshold <= 1 or not 0 <= memory < 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1, memory={memory} at least 0 and below 1")
    if options.get("multilabel"):
        raise ValueError("multilabel: pseudo-labels are of one class each; there is none for several at once")
    for given, known in (
        (options, classify.build.__annotations__),
        (strong or {}, Strong.__dataclass_fields__),
        (weights or {}, TERMS),
    ):
        for option in given:
            if option not in known:
                raise TypeError(f"adapt takes no option {option!r}. {suggest(option, known)}")
    # A map has one pixel a chip of the size that the target's encoder was trained on.
    target: Any = encoder.one("target") if "target" in getattr(encoder, "names", ()) else encoder  # type: ignore[operator]
    options = {"gsd_m": getattr(getattr(target, "settings", None), "chip_m", None), **options}
    task = classify.build("place", encoder=encoder, head=head, **options)
    own = {"variant": variant, "threshold": threshold, "adaptive": adaptive, "memory": memory, "released": released}
    changed = asdict(Strong(**{**asdict(STRONG), **(strong or {})}))
    return Adapt(task, encoder.dim, {**own, "strong": changed, "weights": dict(weights or {})})


@contextlib.contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Inside the block, running statistics of batch normalisation stay as they are: those of a strong view are not what is met later."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum


def turned(batch: Batch, generator: torch.Generator) -> Batch:
    """Each place flipped with a chance of one half and turned by 0, 90, 180 or 270 degrees, all layers alike; flipped alone where images are not square, and
    as it is where they are not of one size, for then pixels are added at the south and east."""
    rasters = {name: layer for name, layer in batch.layers.items() if isinstance(layer, Raster)}
    if len({(p.height_m, p.width_m) for p in batch.places}) != 1 or not rasters:
        return batch
    square = all(r.values.shape[2] == r.values.shape[3] for r in rasters.values())
    draw = uniform(generator, torch.arange(len(batch))[:, None], torch.arange(2)[None])
    flips, turns = (draw[:, 0] < 0.5), (4 * draw[:, 1]).long() * square
    layers: dict[str, Layer] = {}
    for name, raster in rasters.items():
        values, valid = raster.values.clone(), raster.valid.clone()
        of_obs = raster.row.cpu()
        for part in (values, valid):
            flip = flips[of_obs].to(part.device)
            part[flip] = part[flip].flip(3)
            for times in (1, 2, 3) if square else ():
                mine = (turns[of_obs] == times).to(part.device)
                part[mine] = part[mine].rot90(times, (2, 3))
        layers[name] = replace(raster, values=values, valid=valid, var=None)
    return replace(batch, layers={**batch.layers, **layers})


def _none(task: Adapt) -> Tensor:
    return task.domain.weight.new_zeros(0, len(task.task.names))
