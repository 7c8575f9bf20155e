"""Two domains in one dataset, for adaptation: a labelled source, and a target of another sensor with few labels and many places without.

Batches hold three kinds of places: of the source, of the target with a label, and of the target without, in given shares on average. Layers are called
``source/<layer>`` and ``target/<layer>``, as :mod:`everysat.models.domains` reads them; ``label`` is one layer of both, whose classes are those that both have,
by their names.

What is unlabelled is part of the protocol, and scores of the two are not comparable:

- ``inductive``: the training places of the target, without their labels. Test places are never seen.
- ``transductive``: the test places themselves, without their labels, as the released script of SHeDD does it. Scores are of a map of these places, not of new ones.

The class of a place is that of most of its labelled pixels. Places of the target without any, such as most tiles of a scene, are unlabelled ones.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from everysat.data.batches import Dataset
from everysat.data.catalogue import dataset, resolve
from everysat.data.published import one_of
from everysat.find import find, suggest
from everysat.nn.draws import stream
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Layer, Raster

PROTOCOLS = ("inductive", "transductive")
PARTS = ("train", "test")
KINDS = ("source", "labelled", "unlabelled")
"""Of places of a training batch, in the order of ``shares``."""
LABEL = "label"
OTHER, NONE = -2, -1
"""In place of the number of a class: one that domains do not share, none at all."""
Classes = Sequence[str] | Mapping[str, Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class Domain:
    """Places of one domain, of the classes that domains share.

    ``dataset``: what is read. ``name``: ``source`` or ``target``. ``index``: the places that are taken, and ``code`` their classes or :data:`NONE`, int64 [n]. ``bands`` by layer,
    ``coarsen`` as in :func:`build`.
    """

    dataset: Dataset
    name: str
    index: np.ndarray
    code: np.ndarray
    label: Sensor
    bands: Mapping[str, Sequence[str]]
    coarsen: int = 1

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"index {number} is outside {len(self)} places of the {self.name}")
        place = self.dataset[int(self.index[number])]
        rasters = {n: layer for n, layer in place.layers.items() if isinstance(layer, Raster) and n != LABEL}
        layers: dict[str, Layer] = {f"{self.name}/{n}": self._seen(n, raster) for n, raster in rasters.items()}
        where = place.places[0] if self.coarsen == 1 else replace(place.places[0], geobox=None)
        if self.code[number] >= 0:
            code = torch.full((1, 1, 1, 1), float(self.code[number]))
            layers[LABEL] = Raster.of(self.label, code, self.label.bands[0].gsd_m)
        return Batch((where,), layers)

    def some(self, numbers: np.ndarray) -> Domain:
        """Some of its places."""
        return replace(self, index=self.index[numbers], code=self.code[numbers])

    def _seen(self, name: str, raster: Raster) -> Raster:
        return coarser(raster.select(self.bands[name]) if name in self.bands else raster, self.coarsen)


@dataclass(frozen=True)
class Adaptation:
    """See :func:`build`. ``parts`` by kind of place, with the share of each; places of small parts come several times in one round."""

    parts: tuple[Domain, ...]
    labelled: tuple[bool, ...]
    shares: tuple[int, ...]
    protocol: str

    @property
    def rounds(self) -> int:
        """How often a share of each part is taken until all places have been."""
        return max(-(-len(part) // share) for part, share in zip(self.parts, self.shares, strict=True))

    def __len__(self) -> int:
        return self.rounds * sum(self.shares)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        # Parts lie one after another, not in turn: statistics look at every n-th place.
        for part, labelled, share in zip(self.parts, self.labelled, self.shares, strict=True):
            if index < share * self.rounds:
                place = part[index % len(part)]
                return place if labelled else place.without(LABEL)
            index -= share * self.rounds
        raise AssertionError("unreachable")

    def fingerprint(self) -> str:
        told = [
            (
                part.name,
                getattr(part.dataset, "fingerprint", lambda d=part.dataset: f"{type(d).__name__} {len(d)}")(),
                part.index.tolist(),
                part.code.tolist(),
                {name: list(bands) for name, bands in part.bands.items()},
                part.coarsen,
            )
            for part in self.parts
        ]
        text = repr((told, self.labelled, self.shares, self.protocol))
        return f"adaptation:{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def build(
    variant: str = "",
    *,
    target: Mapping[str, Any],
    test: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    unlabelled: Mapping[str, Any] | None = None,
    classes: Classes | None = None,
    shots: int | None = None,
    protocol: str = "inductive",
    part: str = "train",
    shares: Sequence[int] = (1, 1, 1),
    seed: int = 0,
) -> Adaptation:
    """Places of two domains.

    Args:
        target, source, test: datasets with a class a place, as ``{name: rsicd, options: {root: ...}}``; with ``bands`` (``{rgb: [red]}``) also which bands
            of a layer are taken, and with ``coarsen: 4`` means of squares of so many pixels in place of pixels. ``test`` is of the target.
        unlabelled: a dataset of the target whose places are the unlabelled ones, such as all tiles of a scene, in place of those of ``target``. That
            test places are not among them is for the user to see to; their labels, if there are any, are not looked at.
        classes: names that domains share, by default all that each of them has; or, where they differ,
            ``{crops: {source: [rectangular farmland], target: [AnnualCrop, PermanentCrop]}}``. Places of other classes are left out everywhere.
        shots: labels per class of the target, drawn by ``seed``; all by default.
        protocol: ``inductive`` or ``transductive``, see the module's text; the latter needs ``test``.
        part: ``train``, or ``test`` for the test places with their labels.
        shares: of places of the source, of the target with labels, and without; 0 leaves a kind out.

    Raises:
        LookupError, ValueError: datasets do not fit together; the message says which and how.
    """
    one_of(variant, ("",), "variant")
    one_of(protocol, PROTOCOLS, "protocol")
    one_of(part, PARTS, "part")
    if part == "test" and test is None:
        raise ValueError("part='test' needs test, the dataset of the target's test places")
    given = {"source": source, "target": target, "test": test, "unlabelled": unlabelled}
    described = {name: spec for name, spec in given.items() if spec is not None}
    read = {name: _read(name, spec) for name, spec in described.items()}
    sets = domains(read, classes, {name: _view(spec) for name, spec in described.items()})
    if part == "test":
        return Adaptation((sets["test"],), (True,), (1,), protocol)
    return adaptation(sets, shots=shots, protocol=protocol, shares=shares, seed=seed)


def domains(
    read: Mapping[str, Dataset], classes: Classes | None = None, views: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Domain]:
    """Datasets by ``source``, ``target``, ``test`` and ``unlabelled`` as domains of the same classes; ``views`` has ``bands`` and ``coarsen`` of each. See :func:`build`."""
    own = {name: _labels(name, data) for name, data in read.items() if name != "unlabelled"}
    there = {name: {names[c] for c in set(codes.tolist()) if c in names} for name, (codes, names, _) in own.items()}
    listed = _shared(classes, {name: names for name, (_, names, _) in own.items()}, there)
    side_m = own["target"][2]
    band = Band("class", side_m, "class", classes=dict(enumerate(listed)))
    label = Sensor("shared-classes", "classes", (band,), source="classes that both domains have")
    found = {}
    if "unlabelled" in read:
        every = np.arange(len(read["unlabelled"]))
        view = (views or {}).get("unlabelled", {})
        found["unlabelled"] = Domain(
            read["unlabelled"], "target", every, np.full(len(every), NONE), label, **{"bands": {}, **view}
        )
    for name, (codes, names, _) in own.items():
        data, domain = read[name], "source" if name == "source" else "target"
        table = {
            code: number for number, of in enumerate(listed.values()) for code, n in names.items() if n in of[domain]
        }
        code = np.array([NONE if c == NONE else table.get(int(c), OTHER) for c in codes], dtype=np.int64)
        index = np.flatnonzero(code >= (NONE if name == "target" else 0))
        view = (views or {}).get(name, {})
        found[name] = Domain(data, domain, index, code[index], label, view.get("bands", {}), view.get("coarsen", 1))
        for number, cls in enumerate(listed):
            if not (code == number).any():
                raise ValueError(f"{name} has no place of the class {cls!r}: leave it out of classes")
    return found


def adaptation(
    sets: Mapping[str, Domain],
    *,
    shots: int | None = None,
    protocol: str = "inductive",
    shares: Sequence[int] = (1, 1, 1),
    seed: int = 0,
) -> Adaptation:
    """The training places of :func:`domains`, as :func:`build` describes them."""
    one_of(protocol, PROTOCOLS, "protocol")
    if len(shares) != len(KINDS) or min(shares) < 0 or not sum(shares[1:]):
        raise ValueError(
            f"shares={list(shares)} must be three whole numbers ({', '.join(KINDS)}), of the target not all 0"
        )
    if shots is not None and shots < 1:
        raise ValueError(f"shots={shots} must be at least 1 label per class")
    for wanted, needed in (("source", shares[0]), ("test", protocol == "transductive" and shares[2])):
        if needed and wanted not in sets:
            raise ValueError(f"{wanted} is missing: it is needed for shares={list(shares)}, protocol={protocol!r}")
    target, rng = sets["target"], stream(seed, "shots")
    drawn = [
        rng.permutation(np.flatnonzero(target.code == c))[:shots] for c in np.unique(target.code[target.code >= 0])
    ]
    kinds = {
        "source": sets.get("source"),
        "labelled": target.some(np.sort(np.concatenate(drawn))),
        "unlabelled": sets["test"] if protocol == "transductive" and "test" in sets else sets.get("unlabelled", target),
    }
    taken = [(kind, part, share) for (kind, part), share in zip(kinds.items(), shares, strict=True) if share and part]
    return Adaptation(
        tuple(part for _, part, _ in taken),
        tuple(kind != "unlabelled" for kind, _, _ in taken),
        tuple(int(share) for _, _, share in taken),
        protocol,
    )


def coarser(raster: Raster, times: int) -> Raster:
    """Means of the valid pixels of squares of ``times`` x ``times``, as a sensor of larger pixels might see them.

    Raises:
        ValueError: the sides are no multiples of ``times``.
    """
    if times == 1:
        return raster
    if times < 1 or any(side % times for side in raster.values.shape[2:]):
        raise ValueError(
            f"coarsen={times}: images of {raster.values.shape[2]} x {raster.values.shape[3]} pixels are not cut into such squares; "
            "take a divisor of both sides"
        )
    seen = raster.valid.to(raster.values.dtype)
    share = F.avg_pool2d(seen, times)
    mean = F.avg_pool2d(torch.where(raster.valid, raster.values, 0.0), times) / share.clamp(min=1e-9)
    return replace(raster, values=mean, valid=share > 0, gsd_m=raster.gsd_m * times, var=None)


def _read(name: str, spec: Mapping[str, Any]) -> Dataset:
    known = ("name", "options", "bands", "coarsen")
    for key in spec:
        if key not in known:
            raise LookupError(f"{name} has no entry {key!r}. {suggest(key, known)}")
    if "name" not in spec:
        raise ValueError(f"{name}={dict(spec)} must name a dataset, as {{name: rsicd, options: {{root: ...}}}}")
    module, variant = find("data", resolve(spec["name"]))
    takes = inspect.signature(module.build).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in takes):  # a scene, which is read with any option of reading
        found: Dataset = module.build(variant, **spec.get("options", {}))
        return found
    return dataset(spec["name"], **spec.get("options", {}))


def _view(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: spec[key] for key in ("bands", "coarsen") if key in spec}


def _labels(name: str, data: Dataset) -> tuple[np.ndarray, Mapping[int, str], float]:
    """The code of each place or :data:`NONE`, what codes mean, and the side of the first place, metres."""
    if not len(data):
        raise ValueError(f"{name} has no places")
    known = getattr(data, "codes", None)
    first = next((p for p in (data[i] for i in range(len(data))) if LABEL in p.layers), None)
    if first is None:
        raise ValueError(f"{name} has no place with a layer {LABEL!r}")
    classes = first.raster(LABEL).sensor.bands[0].classes
    if not classes:
        raise ValueError(
            f"{name}: its label layer does not say what its codes mean; domains share classes by their names"
        )
    codes = [_code(data[i]) for i in range(len(data))] if known is None else known
    return np.asarray(codes).round().astype(np.int64), classes, first.width_m


def _code(place: Batch) -> int:
    """The class of most labelled pixels of a place."""
    label = place.layers.get(LABEL)
    if not isinstance(label, Raster) or not label.valid[:, 0].any():
        return NONE
    return int(label.values[:, 0][label.valid[:, 0]].round().long().mode().values)


def _shared(
    classes: Classes | None, own: Mapping[str, Mapping[int, str]], there: Mapping[str, set[str]]
) -> dict[str, Mapping[str, Sequence[str]]]:
    """Names of shared classes, and what each domain calls them. ``there``: classes that places have."""
    if classes is None:
        classes = [n for n in own["target"].values() if all(n in names for names in there.values())]
    both = ("source", "target")
    listed: dict[str, Mapping[str, Sequence[str]]]
    listed = dict(classes) if isinstance(classes, Mapping) else {n: dict.fromkeys(both, (n,)) for n in classes}
    if len(listed) < 2:
        raise ValueError(f"classes={list(listed)}: domains need at least two classes in common")
    for name, names in own.items():
        domain = "source" if name == "source" else "target"
        for shared, of in listed.items():
            for wanted in of.get(domain, ()) or ("",):
                if wanted not in names.values():
                    raise LookupError(
                        f"classes: {name} has no class {wanted or shared!r}. {suggest(wanted or shared, names.values())}"
                    )
    return listed
