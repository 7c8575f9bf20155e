"""Models as files for other runtimes: one graph of one chip size and number of dates, that needs no code of this package.

``export(encoder, "model.onnx", obs={"s2": 12})`` writes the graph and, beside it, ``model.onnx.json``: the contract. Inputs per layer are
``<layer>_values`` float32 [chip, obs, band, y, x] in physical units, ``<layer>_valid`` bool of that shape and, of series,
``<layer>_time_s`` float64 [chip, obs, 2], seconds since 1970; the output is [chip, channel, y, x]: features, or what a task
predicts. Normalisation, positions and dates are inside; the number of chips is free.

The graph does what the model does where every patch has been observed in every observation (pixels within may be invalid, where
the model leaves them out one by one). What the model does otherwise, drop patches, is not in it: such a chip is NaN. A mapper that
has more observations than the graph takes gives each chip those of which most was seen there.

ONNX files hold numbers and operators alone. A ``.pt2`` file is an archive that ``torch.export.load`` reads with pickle and evaluates
expressions of; it is loaded only after everything in it was found to be plain: raw numbers, operators of PyTorch, sizes.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everysat.find import suggest
from everysat.io.output import replacing
from everysat.models.weights import contract_path as contract_path
from everysat.models.weights import read_contract
from everysat.nn.dense import dense_features, shifted
from everysat.nn.frozen import Batched, frozen
from everysat.nn.grid import grid_shape
from everysat.nn.inputs import InputConfig, described
from everysat.nn.mappers import Tasked, common_multiple
from everysat.types import ALWAYS, Batch, ContractError, Encoder, Features, Input, Place, Raster, Task

FORMAT = "everysat-exported/1"
KINDS = ("onnx", "pt2")
OPSET = 20
TOLERANCE = 1e-4
"""Largest difference between file and model, as a part of the largest number that the model gives."""
Run = Callable[[Mapping[str, Tensor]], Tensor]


def export(
    model: Encoder | tuple[Encoder, Task],
    path: str | Path,
    *,
    to: str = "",
    obs: Mapping[str, int] | None = None,
    chip_m: float | None = None,
) -> Path:
    """Write a model as a file for other runtimes, once it was seen to give what the model gives.

    Args:
        model: an encoder, whose features are exported, or an encoder and a task, whose predictions are.
        path: ``.onnx`` or ``.pt2``; the contract is written to ``path``.json.
        to: ``onnx`` (needs the packages of ``everysat[export]``) or ``pt2`` (PyTorch's ExportedProgram); by default by the name.
        obs: observations of each layer; needed of series, 1 of others.
        chip_m: side of a chip, metres; by default the model's.

    Raises:
        ContractError: the model cannot be written as one graph, or the file differs from it. ValueError: sizes do not fit.
        ImportError: packages are missing.
    """
    path = Path(path)
    kind = to or path.suffix.lstrip(".").lower()
    if kind not in KINDS:
        raise ValueError(f"to={kind!r} is none of {', '.join(KINDS)}")
    if path.suffix.lower() != f".{kind}":
        raise ValueError(f"path={path} must end in .{kind}: the ending says how the file is read")
    encoder, task = model if isinstance(model, tuple) else (model, None)
    signature = _Signature.of(encoder, task, dict(obs or {}), chip_m)
    contract = signature.contract()
    with replacing(path) as partial:
        one = frozen(signature.one, {name: tensor[0] for name, tensor in signature.random(1, 0).items()})
        _write(one, signature.random(2, 1), kind, partial)
        data = partial.read_bytes()
        difference = _difference(_runner(data, kind), signature)
        facts = {"sha256": hashlib.sha256(data).hexdigest(), "difference": difference, "tolerance": TOLERANCE}
        with replacing(contract_path(path)) as beside:
            beside.write_text(
                json.dumps({**contract, "kind": kind, **_opset(kind), **facts}, indent=1) + "\n", encoding="utf-8"
            )
    return path


def load(path: str | Path) -> Exported:
    """The mapper of an exported file, for :func:`everysat.predict.predict`.

    Raises:
        ContractError: the file is not what its contract says, or holds what is not plain. FileNotFoundError: no such file.
        ImportError: packages are missing.
    """
    path = Path(path)
    contract = read_contract(path, FORMAT, "An exported model is two files, NAME and NAME.json")
    if missing := {"sha256", "kind", "layers", "inputs", "channels", "chip_m", "token_m", "gsd_m", "probabilistic"} - {
        *contract
    }:
        raise ContractError(f"{contract_path(path)} does not say {', '.join(sorted(missing))}; export the model again")
    _session(str(path), contract["sha256"], contract["kind"])
    return Exported(str(path), contract)


def is_exported(name: str | Path) -> bool:
    """Whether a name is that of an exported file."""
    return Path(name).suffix.lower().lstrip(".") in KINDS


@dataclass(frozen=True)
class Exported:
    """Maps with an exported file, chip by chip; chips that the graph does not hold for are NaN. It can be sent to other processes,
    which open the file themselves."""

    path: str
    contract: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Input]:
        """The band contract by layer."""
        return {
            name: InputConfig(**layer["input"]).input(dated=layer["dated"])
            for name, layer in self.contract["layers"].items()
        }

    @property
    def reads(self) -> dict[str, Input]:
        return self.inputs

    @property
    def gsd_m(self) -> float:
        return float(self.contract["gsd_m"])

    @property
    def align_m(self) -> float:
        return common_multiple(
            [self.contract["chip_m"], *(layer["input"]["gsd_m"] for layer in self.contract["layers"].values())]
        )

    @property
    def halo_m(self) -> float:
        return 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.contract["channels"])

    @property
    def probabilistic(self) -> bool:
        return bool(self.contract["probabilistic"])

    def __call__(self, batch: Batch) -> Tensor:
        """[row, channel, y, x] at ``gsd_m``; places are cut into chips, of which the last end where the place ends."""
        known = batch.only(*self.inputs)
        for name, wanted in self.inputs.items():
            known = known.adding(**{name: wanted.fit(self._observed(known, name), name)})
        return torch.stack([self._place(known[index]) for index in range(len(batch))])

    def _observed(self, batch: Batch, name: str) -> Raster:
        raster, wanted = batch.raster(name), self.contract["layers"][name]["obs"]
        least = int(torch.bincount(raster.row, minlength=len(batch)).min()) if len(batch) else wanted
        if least < wanted:
            raise ContractError(
                f"layer {name!r} has {least} observations, {self.path} takes {wanted} of each chip. Give more of them, or export the "
                f"model again for {name}={least}"
            )
        return raster

    def _place(self, place: Batch) -> Tensor:
        unit_m, chip_m = max(self.contract["token_m"], self.gsd_m), self.contract["chip_m"]
        size = place.places[0].height_m, place.places[0].width_m
        tokens = [math.floor(side / unit_m + 1e-4) for side in size]
        if min(tokens) * unit_m < chip_m - 1e-3:
            raise ContractError(
                f"the place is {size[0]:g} x {size[1]:g} m, {self.path} takes chips of {chip_m:g} m: choose a larger place, or export "
                "the model again with a smaller chip_m"
            )
        whole = shifted(place, 0.0, 0.0, (tokens[0], tokens[1]), unit_m)
        found = dense_features(
            self._features, whole, unit_m, token_m=unit_m, chip_m=chip_m, stride_m=chip_m, batch_size=16
        )  # fmt: skip
        image = F.pixel_shuffle(found, round(unit_m / self.gsd_m))[0]
        height, width = grid_shape(place.places, self.gsd_m)
        return F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]), value=math.nan)

    def _features(self, chips: Batch) -> Features:
        given: dict[str, Tensor] = {}
        for name, layer in self.contract["layers"].items():
            raster = chips.raster(name)
            values, valid, time_s = (
                t.unflatten(0, (len(chips), -1)) for t in (raster.values, raster.valid, raster.time_s)
            )
            if values.shape[1] > layer["obs"]:
                seen = valid.flatten(2).float().mean(-1)
                best = torch.argsort(seen, dim=1, descending=True, stable=True)[:, : layer["obs"]].sort(1).values
                row = torch.arange(len(chips))[:, None]
                values, valid, time_s = values[row, best], valid[row, best], time_s[row, best]
            given |= {
                f"{name}_values": torch.where(valid, values, 0.0).float(),
                f"{name}_valid": valid,
                f"{name}_time_s": time_s,
            }
        run = _session(self.path, self.contract["sha256"], self.contract["kind"])
        image = run({name: given[name].contiguous() for name in self.contract["inputs"]})
        unit_m = max(self.contract["token_m"], self.gsd_m)
        return Features.of_grid(F.pixel_unshuffle(image, round(unit_m / self.gsd_m)), chips.places, unit_m)


# --- what is written ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Signature:
    """A model, and the chips that a file is for."""

    encoder: Encoder
    task: Task | None
    obs: dict[str, int]
    chip_m: float
    token_m: float

    @classmethod
    def of(cls, encoder: Encoder, task: Task | None, obs: dict[str, int], chip_m: float | None) -> _Signature:
        encoder, task = (None if part is None else copy.deepcopy(part).cpu().eval() for part in (encoder, task))  # type: ignore[assignment]
        settings: Any = getattr(encoder, "settings", None)
        if settings is None or not hasattr(settings, "token_m"):
            raise ContractError(
                f"a model of family {encoder.family!r} makes no grid of tokens, so no map: it is not exported"
            )
        if not encoder.inputs:
            raise ContractError(
                f"the {encoder.family} takes any layer and lists none, but a graph is of certain layers: load it with statistics of "
                "those that it shall take (everysat stats)"
            )
        for name in obs:
            if name not in encoder.inputs:
                raise ContractError(f"obs names the layer {name!r}. {suggest(name, encoder.inputs)}")
        for name, wanted in encoder.inputs.items():
            if wanted.dated and name not in obs:
                raise ContractError(
                    f"layer {name!r} is a series: say how many dates a chip has (obs, or --obs {name}=12)"
                )
            if obs.setdefault(name, 1) < 1:
                raise ValueError(f"obs says {obs[name]} of layer {name!r}; it must be at least 1")
        chip_m = float(chip_m or settings.chip_m)
        for what, side in {
            "token": settings.token_m,
            **{f"pixel of {n}": i.gsd_m for n, i in encoder.inputs.items()},
        }.items():
            if abs(chip_m / side - round(chip_m / side)) > 1e-3 or chip_m < side:
                raise ValueError(f"chip_m={chip_m:g} is no multiple of the {what}, {side:g} m")
        return cls(encoder, task, obs, chip_m, float(settings.token_m))

    @property
    def place(self) -> Place:
        return Place(self.chip_m, self.chip_m)

    def one(self, given: Mapping[str, Tensor]) -> Tensor:
        """What the model says of one chip, [channel, y, x]."""
        return self.model({name: tensor[None] for name, tensor in given.items()})[0]

    def model(self, given: Mapping[str, Tensor]) -> Tensor:
        """What the model says, [chip, channel, y, x], NaN where it says nothing."""
        count, layers = len(next(iter(given.values()))), {}
        for name, wanted in self.encoder.inputs.items():
            values, time_s = given[f"{name}_values"].flatten(0, 1), given.get(f"{name}_time_s")
            when = torch.tensor([ALWAYS] * len(values), dtype=torch.float64) if time_s is None else time_s.flatten(0, 1)
            row = torch.arange(count).repeat_interleave(len(values) // count)
            layers[name] = Raster(wanted.sensor, values, given[f"{name}_valid"].flatten(0, 1), when, row, wanted.gsd_m)
        batch = Batch((self.place,) * count, layers)
        with torch.no_grad():
            if self.task is None:
                return self.encoder(self.encoder.tokenize(batch)).grid()
            predicted = self.task.predict(self.task.features(self.encoder, batch), batch)
        return torch.where(predicted.valid, predicted.values, math.nan)

    def random(self, count: int, seed: int, invalid: float = 0.0) -> dict[str, Tensor]:
        """Chips of random values and dates, a share of the values invalid."""
        g, given = torch.Generator().manual_seed(seed), {}
        year = torch.randint(0, 3300, (count, 1), generator=g)  # its first day, the same of all layers
        for name, wanted in self.encoder.inputs.items():
            side = round(self.chip_m / wanted.gsd_m)
            shape = (count, self.obs[name], len(wanted.mean), side, side)
            mean, std = (torch.tensor(of).view(-1, 1, 1) for of in (wanted.mean, wanted.std))
            given[f"{name}_values"] = mean + std * torch.randn(shape, generator=g)
            given[f"{name}_valid"] = torch.rand(shape, generator=g) >= invalid
            if wanted.dated:
                start = 1.45e9 + 86400.0 * (year + torch.randint(0, 360, shape[:2], generator=g)).double()
                given[f"{name}_time_s"] = torch.stack([start, start + 1], -1)
        return given

    def contract(self) -> dict[str, Any]:
        """What the file takes and gives."""
        shape = self.model(self.random(1, 0)).shape
        gsd_m = self.chip_m / shape[2]
        ratio = max(self.token_m, gsd_m) / gsd_m
        if shape[2] != shape[3] or abs(ratio - round(ratio)) > 1e-3:
            raise ContractError(
                f"the model gives {shape[2]} x {shape[3]} pixels of a chip of {self.chip_m:g} m, which no map is made of"
            )
        tasked = None if self.task is None else Tasked(self.encoder, self.task, gsd_m, self.chip_m, 0.0)
        layers = {
            name: {
                "input": described(wanted),
                "units": [band.unit for band in wanted.sensor.bands],
                "dated": wanted.dated,
                "obs": self.obs[name],
                "chip_px": round(self.chip_m / wanted.gsd_m),
            }
            for name, wanted in self.encoder.inputs.items()
        }
        return {
            "format": FORMAT,
            "family": self.encoder.family,
            "layers": layers,
            "inputs": list(self.random(1, 0)),
            "chip_m": self.chip_m,
            "token_m": self.token_m,
            "gsd_m": gsd_m,
            "channels": [f"feature {i}" for i in range(shape[1])] if tasked is None else list(tasked.names),
            "probabilistic": tasked is not None and tasked.probabilistic,
        }


def _difference(run: Run, signature: _Signature) -> float:
    """Largest difference between file and model, as a part of the largest number, on other chips than the graph was made of."""
    worst = 0.0
    for count, invalid in ((1, 0.0), (3, 0.0), (3, 0.1)):
        given = signature.random(count, 7 + count, invalid)
        found, expected = run(given), signature.model(given)
        said = torch.isfinite(found)
        if found.shape != expected.shape or (not invalid and not said.all()):
            raise ContractError(
                f"the file says nothing of chips that the {signature.encoder.family} maps: what it does hangs on their numbers, which "
                "a graph for other runtimes cannot. Use the weights file itself"
            )
        if said.any():
            worst = max(
                worst, float((found - expected)[said].abs().max() / expected[said].abs().max().clamp(min=1e-12))
            )
    if not worst <= TOLERANCE:
        raise ContractError(
            f"the file differs from the model by {worst:.2g} of its largest number, {TOLERANCE:g} is allowed; nothing was written. "
            "Use the weights file itself"
        )
    return worst


def _write(one: Batched, example: Mapping[str, Tensor], kind: str, path: Path) -> None:
    chips = torch.export.Dim("chips", min=1)
    sizes = {"inputs": tuple({0: chips} for _ in example)}
    with _quiet():
        program = torch.export.export(one, tuple(example.values()), dynamic_shapes=sizes, strict=False)
        if kind == "pt2":
            program = program.run_decompositions({})
            program._example_inputs, program._guards_code = None, []  # the ones would be pickled, the others evaluated
            for node in program.graph.nodes:  # where in the sources it came from
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
                    node.meta.pop(key, None)
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            path.write_bytes(buffer.getvalue())
            return
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError("ONNX needs more packages: pip install 'everysat[export]'") from error
        names = {"input_names": list(example), "output_names": ["output"]}
        made = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET, **names)  # type: ignore[arg-type]
        assert made is not None
        made.save(str(path), external_data=False)


def _opset(kind: str) -> dict[str, Any]:
    return {"opset": OPSET} if kind == "onnx" else {"torch": torch.__version__}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# --- what is read -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _session(path: str, sha256: str, kind: str) -> Run:
    data = Path(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ContractError(
            f"{path} is not the file that its contract describes (sha256 differs): damaged, or mixed up"
        )
    return _runner(data, kind)


def _runner(data: bytes, kind: str) -> Run:
    """What runs a file, on one thread: windows are computed side by side, and sums must not depend on how many threads share them."""
    if kind == "onnx":
        return _onnx_runner(data)
    _require_plain(data)
    with _quiet():
        module = torch.export.load(io.BytesIO(data)).module()

    def run(given: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            found: Tensor = module(*given.values())
        return found

    return run


def _onnx_runner(data: bytes) -> Run:
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("ONNX files are run by a further package: pip install 'everysat[export]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    taken = {node.name for node in session.get_inputs()}

    def run(given: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {n: t.numpy() for n, t in given.items() if n in taken})[0])

    return run


_PLAIN = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|mod|eq|ge|gt|le|lt)|torch\.sym_\w+|"
)
_SIZE = re.compile(
    r"(?:Mul|Add|Pow|FloorDiv|Max|Min|Integer|Symbol|'?\b[su]\d+\b'?|positive=True|integer=True|\b\d+\b|[(), *+-])+"
)


def _require_plain(data: bytes) -> None:
    """Refuse an archive that holds pickled objects or code, or calls anything but operators of PyTorch."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                part = name.split("/", 1)[-1]
                if part.endswith(".json"):
                    _require_plain_json(json.loads(archive.read(name)), part)
                elif archive.getinfo(name).file_size and not _is_raw(part):
                    raise ContractError(f"{part} may hold a pickled object or code")
    except (zipfile.BadZipFile, ValueError) as error:
        raise ContractError(
            f"the .pt2 file is not loaded, since loading could run what is in it: {error}. Use an .onnx file, which holds no code, or "
            "export the model again"
        ) from error


def _is_raw(part: str) -> bool:
    marks = ("byteorder", "archive_format", "archive_version", ".data/version", ".data/serialization_id")
    return part in marks or re.fullmatch(r"data/(weights|constants)/(weight|tensor)_\d+", part) is not None


def _require_plain_json(content: Any, part: str) -> None:
    if isinstance(content, list):
        for each in content:
            _require_plain_json(each, part)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key in ("use_pickle", "guards_code") and value:
                raise ContractError(f"{part} names {'a pickled object' if key == 'use_pickle' else 'code to evaluate'}")
            if key == "target" and isinstance(value, str) and not _PLAIN.fullmatch(value):
                raise ContractError(f"{part} calls {value!r}")
            if key == "expr_str" and not _SIZE.fullmatch(str(value)):
                raise ContractError(f"{part} evaluates {value!r}")
            _require_plain_json(value, part)
