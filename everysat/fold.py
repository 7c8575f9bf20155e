"""One split of a dataset as a suite uses it: its parts, what is labelled in them, draws of labels, and whether the parts leak."""

from __future__ import annotations

import copy
from functools import cached_property

import numpy as np
from scipy.spatial import cKDTree
from torch import Tensor

from everysat.data import leakage
from everysat.data.catalogue import dataset
from everysat.data.disturbed import Disturbed
from everysat.data.split import autocorrelation_range_m, label_fraction, unit_sphere_m
from everysat.data.statistics import band_statistics
from everysat.evaluate import Draw
from everysat.features import Labelled, Part
from everysat.nn.draws import stream
from everysat.recipe import RecipeError
from everysat.suite import Data, Disturbance, amount
from everysat.types import Raster

PARTS = ("train", "val", "test")
STRIDE = 10_000_000
"""Numbers of places begin anew at multiples of it in each part of each fold."""


class Leak(ValueError):
    """What trains a model also tests it."""


class Fold:
    """One split of a dataset: its parts, and what is labelled in them."""

    def __init__(self, data: Data, number: int) -> None:
        options = dict(data.options)
        if data.folds[number] is not None:
            options[data.fold_option] = data.folds[number]
        self.data, self.number = data, number
        of = {part: dataset(data.name, **options, **{data.part_option: name}) for part, name in data.parts.items()}
        self.parts = {part: Part(one, data.target, (), data.per_place, pairs=data.pairs) for part, one in of.items()}
        self.offset = number * len(PARTS) * STRIDE
        if not data.leaks:
            self.refuse_leaks()

    def showing(self, title: str) -> Fold:
        """The same split as the modality subset of that title shows it; what was read, and the labels, are shared."""
        twin = copy.copy(self)
        twin.__dict__["labelled"] = self.labelled
        twin.parts = {name: part.showing(self.data.shown(title)) for name, part in self.parts.items()}
        if title in self.data.disturbed:
            twin.parts["test"] = twin._disturbed(self.data.disturbed[title])
        return twin

    def _disturbed(self, wrong: Disturbance) -> Part:
        """The part that tests, disturbed; noise is measured by training places."""
        data, train, test = self.data, self.parts["train"], self.parts["test"]
        moments = band_statistics(train.dataset, train.layers or None, places=256)
        settings = wrong.model_dump(exclude={"of"})
        std = {name: std for name, (_, std) in moments.items() if name != data.target}
        dataset = Disturbed(test.dataset, std=std, seed=self.number, **settings)
        return Part(dataset, data.target, test.layers, data.per_place, pairs=data.pairs)

    @cached_property
    def labelled(self) -> dict[str, Labelled]:
        return {name: part.labelled() for name, part in self.parts.items()}

    def group(self, part: str) -> Tensor:
        """Number of the place of each sample, unique over parts and folds."""
        return self.labelled[part].place + self.offset + PARTS.index(part) * STRIDE

    def draw(self, labels: str, seed: int) -> Draw:
        """Places that train, test and choose: the same share (or number) of labels of each class for training and choosing."""
        chosen = {name: self._chosen(name, labels, seed) for name in self.parts if name != "test"}
        test = self.group("test").unique().tolist()
        return (chosen["train"], test, chosen["val"]) if "val" in chosen else (chosen["train"], test)

    def _chosen(self, part: str, labels: str, seed: int) -> list[int]:
        share, shots = amount(labels)
        places, first = np.unique(self.group(part).numpy(), return_index=True)
        label, rng = self.labelled[part].label, stream(seed, self.offset, part, "labels")
        one_a_place = len(places) == len(label) and label.ndim == 1 and not label.is_floating_point()
        strata = label.numpy()[first] if one_a_place else np.zeros(len(places), dtype=int)
        if not shots:
            return places[label_fraction(strata, share, rng)].tolist()
        if not one_a_place:
            raise RecipeError(f"labels={labels!r} needs one class a place; say a share such as 10%")
        taken = [rng.permutation(np.flatnonzero(strata == c))[:shots] for c in np.unique(strata)]
        return places[np.sort(np.concatenate(taken))].tolist()

    def refuse_leaks(self) -> None:
        """Raises:
        Leak: a place that trains or chooses shares ground, or an image, with one that tests.
        """
        names = [name for name in PARTS if name in self.parts]
        of = [(name, index) for name in names for index in range(len(self.parts[name]))]
        number = np.array([names.index(name) for name, _ in of])
        places = [self.parts[name].shown(self.parts[name].place(index)) for name, index in of]
        outlines = [leakage.corners(place.places[0]) for place in places]
        known = np.array([i for i, outline in enumerate(outlines) if outline is not None], dtype=int)
        if len(known):
            shapes = np.stack([outline for outline in outlines if outline is not None])
            for pair in leakage.close_pairs(shapes, number[known]):
                self._refuse(
                    of[known[pair.a]], of[known[pair.b]], f"share {pair.share:.0%} of the smaller one's ground"
                )
        for layer in sorted({name for place in places for name in place.layers}):
            rasters = [place.layers.get(layer) for place in places]
            digests = [leakage.digest(one) if isinstance(one, Raster) and _tells(one) else 0 for one in rasters]
            pairs, _ = leakage.equal_pairs(np.array(digests, dtype=np.uint64), number)
            for a, b in pairs:
                self._refuse(of[a], of[b], f"have the same pixels in layer {layer!r}")

    def _refuse(self, a: tuple[str, int], b: tuple[str, int], why: str) -> None:
        if "test" in (a[0], b[0]):
            raise Leak(
                f"place {a[1]} of {a[0]} and place {b[1]} of {b[0]} {why}: a score would be too good. Split by blocks of ground, see everysat data "
                "check; or say leaks: true for the dataset, and why in its about"
            )

    @cached_property
    def ground(self) -> dict[str, float]:
        """``correlated_m``: how far the labels of training places are alike, see :func:`autocorrelation_range_m`; ``apart_m``: the median distance of a
        test place to the nearest training place. Empty where it is not known where places lie, or of few places."""
        at = {
            name: [self.parts[name].place(i).places[0].lonlat for i in range(len(self.parts[name]))]
            for name in ("train", "test")
        }
        if any(lonlat is None for part in at.values() for lonlat in part) or len(at["train"]) < 10 or not at["test"]:
            return {}
        train, test = (unit_sphere_m(np.array(at[name], dtype=float)) for name in ("train", "test"))
        labelled = self.labelled["train"]
        one = np.unique(labelled.place.numpy(), return_index=True)[1]
        x, y = train[labelled.place[one].numpy()], labelled.label[one].double().numpy()
        onehot = y if y.ndim > 1 or labelled.label.is_floating_point() else np.eye(len(labelled.classes))[y.astype(int)]
        return {
            "correlated_m": autocorrelation_range_m(x, onehot, np.random.default_rng(0)),
            "apart_m": float(np.median(cKDTree(train).query(test)[0])),
        }


def _tells(raster: Raster) -> bool:
    """Whether equal pixels mean the same place: weather and terrain of coarse grids are alike by nature."""
    return int(raster.valid.sum()) >= 16 and raster.sensor.kind in ("optical", "sar")
