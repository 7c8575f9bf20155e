"""Maps of how sure a representation is, from the variances of a probabilistic encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

from everysat.nn.gaussian import information
from everysat.nn.mappers import Dense
from everysat.types import Batch, Encoder, Features


@dataclass(frozen=True)
class Informed:
    """Features [token, 1] and summaries [row, 1] that are the :func:`information` of those of ``encoder``: nats per dimension, 0 for no evidence."""

    encoder: Encoder

    def __call__(self, batch: Batch) -> Features:
        return informed(self.encoder.embed(batch))


def informed(features: Features) -> Features:
    """Nats per dimension in place of features; ValueError where they have no variance."""
    if features.var is None or features.summary_var is None:
        raise ValueError(
            "the features have no variance: confidence needs a probabilistic encoder (model.probabilistic: true)"
        )
    said, of_places = information(features.var)[:, None], information(features.summary_var)[:, None]
    return replace(features, mean=said, summary=of_places, var=None, summary_var=None)


class Confidence(Dense):
    """A map of one channel: how sure the features of each pixel are, nats per dimension; NaN where nothing was observed. Options as for
    :class:`Dense`. ``Stacked`` puts it beside the features."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("confidence",)


def confidence(mapper: Dense) -> Confidence:
    """The mapper of how sure an encoder is where ``mapper`` maps its features, for :func:`everysat.predict.predict`."""
    return Confidence(**{**vars(mapper), "embed": Informed(mapper.encoder), "dim": 1})
