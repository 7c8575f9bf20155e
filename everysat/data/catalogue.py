"""Which datasets there are, under which names they are published, and where they come from.

``dataset("pastis-hd", root, split="train", fold=1)`` is also ``everysat.data(...)``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from everysat.data.batches import Dataset
from everysat.find import find, names, suggest
from everysat.io.hosts import Origin, origins

PUBLISHED_AS = {
    "bigearthnet-v2": "bigearthnet",
    "reben": "bigearthnet",
    "bradd-s1ts": "braddts",
    "hls-burn-scars": "burnscars",
    "flair-1": "flair/1",
    "flair-2": "flair/2",
    "geolifeclef-2022": "geolifeclef/2022",
    "geolifeclef-2023": "geolifeclef/2023",
    "mmearth64": "mmearth",
    "mmearth100k": "mmearth/100k",
    "pastis-hd": "pastis",
    "pastis-r": "pastis",
    "rsitmd": "captions/rsitmd",
    "rsvqa-hr": "rsvqa/hr",
    "rsvqa-lr": "rsvqa/lr",
    "s2naip-urban": "s2naip",
    "so2sat-lcz42": "so2sat",
    "spacenet-7": "spacenet7",
    "treesatai-ts": "treesatai",
    "treesatai-time-series": "treesatai",
    "ucm-captions": "captions/ucm",
}
"""Other names of datasets, as their authors spell them, and what they are called here."""
HOSTED = {
    "pastis-hd": "huggingface",
    "pastis-r": "zenodo",
    "treesatai-ts": "huggingface",
    "treesatai-time-series": "huggingface",
}
"""Which host a published name means, where a module has several."""


@dataclass(frozen=True)
class Entry:
    """One dataset: what its module says of it, and ``at_hand``: where it lies, or what can be had without a download."""

    name: str
    title: str
    layers: tuple[str, ...]
    splits: tuple[str, ...]
    licence: str
    source: str
    at_hand: str


def resolve(name: str) -> str:
    """The name here of a dataset: ``PASTIS-HD`` -> ``pastis``, ``flair-2`` -> ``flair/2``; a dotted path stays as it is.

    Raises:
        LookupError: no dataset is called so; the message offers the nearest names.
    """
    stem, slash, variant = name.partition("/")
    if "." in stem:
        return name
    known = {_plain(here): here for here in names("data")} | {_plain(a): here for a, here in PUBLISHED_AS.items()}
    if _plain(stem) not in known:
        raise LookupError(f"no dataset is called {name!r}. {suggest(stem.lower(), {*names('data'), *PUBLISHED_AS})}")
    here = known[_plain(stem)]
    if variant and "/" in here:
        raise LookupError(f"{stem} already is the variant {here}; give that, or {here.partition('/')[0]}/{variant}")
    return f"{here}{slash}{variant}" if variant else here


def is_dataset(name: str) -> bool:
    """Whether a dataset is called so, and no file."""
    try:
        return not Path(name).exists() and bool(resolve(name)) and "." not in name
    except LookupError:
        return False


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def dataset(name: str, root: str | Path | None = None, **options: Any) -> Dataset:
    """A dataset by its name, here or as published, with the variant behind a slash: items are batches of one place.

    Args:
        root: the folder that holds it, for datasets that lie in one.
        options: of its module's ``build``, such as ``split="train"``, ``fold=1`` or ``modalities=["s2", "s1-asc"]``.

    Raises:
        LookupError: no such dataset, or option. ValueError: an option is needed, or has no such value.
        FileNotFoundError: the data are not in ``root``.
    """
    module, variant = find("data", resolve(name))
    takes = inspect.signature(module.build).parameters
    if root is not None:
        options["root"] = root
    for option in options:
        if option not in takes:
            raise LookupError(f"dataset {name} has no option {option!r}. {suggest(option, list(takes)[1:])}")
    lacking = [option for option in _needed(module) if option not in options]
    if lacking == ["root"]:
        raise ValueError(f"dataset {name} needs root, the folder that holds it. It is published at {module.SOURCE}")
    if lacking:
        raise ValueError(f"dataset {name} needs the option {lacking[0]!r}")
    return module.build(variant or takes["variant"].default, **options)


def splits(name: str, root: str | Path | None = None, wanted: Iterable[str] = (), **options: Any) -> dict[str, Dataset]:
    """The official parts of a dataset by name: those ``wanted``, or all. One that has none is one part, ``all``."""
    module, _ = find("data", resolve(name))
    known = tuple(wanted) or tuple(getattr(module, "SPLITS", ()))
    if "split" not in inspect.signature(module.build).parameters or "split" in options:
        return {str(options.get("split", "all")): dataset(name, root, **options)}
    return {split: dataset(name, root, split=split, **options) for split in known}


def _needed(module: ModuleType) -> list[str]:
    given = list(inspect.signature(module.build).parameters.items())[1:]
    return [name for name, p in given if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def entries(folder: str | Path | None = None) -> Iterator[Entry]:
    """All datasets; with ``folder``, looked for there, in folders whose names begin like the dataset's, and in it."""
    for name in names("data"):
        module, _ = find("data", name)
        yield Entry(
            name,
            (module.__doc__ or "").partition("\n")[0].rstrip("."),
            tuple(getattr(module, "LAYERS", ())),
            tuple(getattr(module, "SPLITS", ())),
            getattr(module, "LICENCE", ""),
            getattr(module, "SOURCE", ""),
            _at_hand(name, module, folder),
        )


def _at_hand(name: str, module: ModuleType, folder: str | Path | None) -> str:
    needed = _needed(module)
    if needed not in ([], ["root"]):
        return f"needs {', '.join(needed)}"
    try:
        if not needed:
            module.build()
            return "yes"
        for root in _candidates(name, folder):
            if _builds(module, root):
                return str(root)
    except FileNotFoundError as error:
        return str(error)
    return "no (a synthetic stand-in can be made)" if hasattr(module, "fake") else "no"


def _candidates(name: str, folder: str | Path | None) -> list[Path]:
    if folder is None or not Path(folder).is_dir():
        return []
    called = {_plain(name)} | {_plain(alias) for alias, here in PUBLISHED_AS.items() if here.partition("/")[0] == name}
    below = sorted(d for d in Path(folder).iterdir() if d.is_dir() and _plain(d.name).startswith(tuple(called)))
    return [*below, Path(folder)]


def _builds(module: ModuleType, root: Path) -> bool:
    try:
        return len(module.build(root=root)) > 0
    except (OSError, ValueError, LookupError):
        return False


def licence(name: str) -> str:
    """The licence that the module of a dataset states."""
    return getattr(find("data", resolve(name))[0], "LICENCE", "")


def origin(name: str, host: str | None = None) -> Origin:
    """Where the files of a dataset can be fetched from.

    Args:
        host: ``zenodo``, ``huggingface``, ``google`` or ``s3``, where a dataset is at several.

    Raises:
        LookupError: no such dataset; it is at no host that lists its files; or at several, of which none was chosen. The message
            names the pages to visit.
    """
    module, _ = find("data", resolve(name))
    source = getattr(module, "SOURCE", "")
    if not source:
        raise LookupError(
            f"dataset {name} is not fetched from anywhere: {(module.__doc__ or '').partition(chr(10))[0]}"
        )
    found = origins(source)
    if not found:
        raise LookupError(
            f"dataset {name} is published where files cannot be listed by a program. Visit {source}, and put them into a "
            f"folder in this layout:\n\n{inspect.cleandoc(module.__doc__ or '')}"
        )
    meant = {_plain(alias): chosen for alias, chosen in HOSTED.items()}.get(_plain(name.partition("/")[0]))
    at = [one for one in found if one.host == (host or meant or one.host)]
    if not at:
        raise LookupError(f"dataset {name} is not at {host}; it is at {', '.join(one.page for one in found)}")
    if len(at) > 1:
        pages = ", ".join(f"{one.host} ({one.page})" for one in at)
        raise LookupError(f"dataset {name} is at {pages}. Choose with host=, --from on the command line")
    return at[0]
