"""One loop that trains everything: pre-training and fine-tuning differ in the objective alone.

Every random draw is a function of (seed, step, purpose), so a run that was killed and resumed, whenever, ends with the weights
of one that was not. All processes share one global batch; losses are those of that batch (see :mod:`everysat.nn.gather`).

    run = train(Recipe.load("recipe.yaml"))
    features = run.encoder.embed(batch)
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everysat import checkpoint, manifest
from everysat.data.batches import Dataset, Plan, Tolerant, in_order, observations, prefetch, shard
from everysat.logbook import Logbook, Stop
from everysat.models import weights
from everysat.nn import lora
from everysat.nn.batchnorm import over_processes
from everysat.nn.draws import generator, key
from everysat.nn.gather import alone, world
from everysat.optimizer import Average, adamw, adapt, freeze, learning_rate, restrict, train_mode
from everysat.progress import Progress
from everysat.recipe import Recipe as Recipe
from everysat.recipe import RecipeError
from everysat.trainee import Held, Trainee, build_encoder, launch, with_absent_layers
from everysat.types import Batch, Encoder, Objective, Task

FREE_TO_CHANGE = {
    "out",
    "workers",
    "devices",
    "accelerator",
    "checkpoint_every",
    "validate_every",
    "tensorboard",
    "validation",
}
"""Fields of a recipe that may differ when a run is resumed: they do not touch the weights (beyond rounding, for devices)."""


class NonFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite. The message names step, term or parameter, and the places of the batch."""


@dataclass(frozen=True)
class Run:
    """A finished run: ``encoder`` and ``objective`` (the task, when there is one) in eval mode, with the averaged weights if
    the recipe asks for an average; ``log`` has one dict per step or validation."""

    recipe: Recipe
    encoder: Encoder
    objective: Objective
    log: list[dict[str, Any]]

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def weights(self) -> Path:
        """The weights file, for :func:`everysat.load`."""
        return self.folder / "weights.safetensors"


def train(
    recipe: Recipe,
    *,
    data: Sequence[Dataset] | None = None,
    validation: Sequence[Dataset] | None = None,
    restart: bool = False,
    quiet: bool = False,
) -> Run:
    """Train as the recipe says, in ``recipe.folder``: ``weights.safetensors`` with its contract, ``log.jsonl``, ``recipe.yaml``,
    ``run.json`` (the manifest) and, until the end, ``checkpoint.safetensors``. ``train: lora`` also leaves ``lora.safetensors``, the
    low-rank factors alone, which the weights have merged in.

    A run that was stopped goes on; one that is complete is loaded. Ctrl-C or SIGTERM saves a checkpoint first.

    Args:
        data, validation: datasets in place of those that the recipe names, in the same order.
        restart: begin anew whatever lies in the folder.
        quiet: no progress.

    Raises:
        RecipeError: the recipe does not fit its modules, or the folder holds a run of another recipe.
        NonFiniteError: the loss or the gradient is not finite. KeyboardInterrupt: after a checkpoint was saved.
    """
    fabric = launch(recipe)
    cuda = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        return _Training(recipe, fabric, data, validation, restart, quiet).run()


class _Training:
    """The state of a run. Read :meth:`run`."""

    def __init__(
        self,
        recipe: Recipe,
        fabric: Any,
        data: Sequence[Dataset] | None,
        validation: Sequence[Dataset] | None,
        restart: bool,
        quiet: bool,
    ) -> None:
        self.recipe, self.fabric, self.restart = recipe, fabric, restart
        self.quiet, self.folder, self.leads = quiet, recipe.folder, fabric.global_rank == 0
        self.data = data or [source.build("data") for source in recipe.data]
        self.validation = validation or [source.build("data") for source in recipe.validation]
        if len(self.data) != len(recipe.data):
            raise ValueError(f"data has {len(self.data)} datasets, the recipe lists {len(recipe.data)}")
        torch.manual_seed(key(recipe.seed, "weights"))
        self.encoder = build_encoder(recipe, self.data)
        adapt(self.encoder, recipe.train)
        kind, named = ("tasks", recipe.task) if recipe.task else ("objectives", recipe.objective)
        self.objective: Objective = named.build(kind, encoder=self.encoder)  # type: ignore[union-attr]
        self.keep: Collection[str] = (self.objective.target,) if isinstance(self.objective, Task) else ()
        self.plan = Plan(
            [len(d) for d in self.data],
            [source.weight for source in recipe.data],
            batch_size=recipe.batch_sizes,
            accumulate=recipe.accumulate,
            steps=recipe.steps,
            seed=recipe.seed,
            lengths=[observations(d) for d in self.data] if recipe.by_length else None,
        )
        self._prepare()

    def _prepare(self) -> None:
        """Freeze, make the optimiser and the average, and hand everything to the device."""
        recipe, device, self.trainee = self.recipe, self.fabric.device, Trainee(self.encoder, self.objective)
        restrict(self.trainee, recipe.train)
        freeze(self.trainee, recipe.freeze)
        if self.fabric.world_size > 1:
            over_processes(self.trainee)
        self.trainee.to(device)
        self.adam = adamw(recipe, self.trainee, device)
        self.module, self.optimizer = self.fabric.setup(self.trainee, self.adam)
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in self.trainee.named_parameters()}
        self.trained = [p for p in self.names if p.requires_grad]
        self.average = Average(self.trained, recipe.ema) if recipe.ema is not None else None

    # --- the run, from its beginning to its end ---------------------------------------------------------------------

    def run(self) -> Run:
        first = self._first_step()
        if first is None:
            return self._finished()
        with ExitStack() as stack:
            record = log = None
            if self.leads:
                record = stack.enter_context(manifest.Manifest(self.folder / "run.json", **self._facts(first)))
                self.recipe.dump(self.folder / "recipe.yaml")
                log = stack.enter_context(Logbook(self.folder, first, tensorboard=self.recipe.tensorboard))
            stop = stack.enter_context(Stop())
            bar = Progress(self.recipe.name, self.recipe.steps, done=first, quiet=self.quiet or not self.leads)
            try:
                self._loop(first, log, stop, stack.enter_context(bar))
            finally:
                if record is not None and self._broken():
                    record.note(broken_places=self._broken())
            if self.average is not None:
                self.average.swap()
            if self.leads and lora.adapted(exported := self.objective.exported(self.encoder)):
                lora.save(exported, self.folder / "lora.safetensors")
            lora.merge(self.trainee)
            if record is not None:
                self._save_weights()
                record.note(weights_sha256=manifest.sha256(self.folder / "weights.safetensors"))
        if self.leads:
            self._checkpoint_file.unlink(missing_ok=True)
        self.fabric.barrier()
        encoder = self.objective.exported(self.encoder).eval()
        return Run(self.recipe, encoder, self.objective.eval(), Logbook.read(self.folder))

    def _loop(self, first: int, log: Logbook | None, stop: Stop, bar: Progress) -> None:
        steps = range(first, self.recipe.steps)
        batches = prefetch(self._load, steps, workers=self.recipe.workers)
        try:
            for step, batch in zip(steps, batches, strict=True):
                row, stopped = self._step(step, batch, stop)
                size = self.recipe.batch_sizes[int(self.plan.datasets[step])]
                rate = size * self.recipe.accumulate / max(row["seconds"], 1e-9)
                source = f"{self._source(step)}: " if len(self.data) > 1 else ""
                bar.advance(note=f"{source}loss {row['loss']:.4g}, {rate:.3g} places/s")
                done = step + 1
                last = done == self.recipe.steps
                found = self.validate() if self.validation and (last or _due(done, self.recipe.validate_every)) else {}
                if log is not None:
                    log.write(done, **row, **found)
                if stopped or last or _due(done, self.recipe.checkpoint_every):
                    self._save_checkpoint(done)
                if stopped and not last:
                    raise KeyboardInterrupt(f"stopped after step {done}; the same command goes on from there")
        finally:
            batches.close()  # type: ignore[attr-defined]

    def _step(self, step: int, batches: list[Batch], stop: Stop) -> tuple[dict[str, float], bool]:
        """One optimiser step; its row of the log, and whether the run is to stop."""
        begun = time.monotonic()
        train_mode(self.trainee)
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.lr * group["scale"] * learning_rate(self.recipe, step)
        terms, stopped = self._reduced(self._backward(step, batches), stop)
        self._refuse_non_finite(step, terms)
        norm = self._clip(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.objective.after_step(self.encoder, step, self.recipe.steps)
        if self.average is not None:
            self.average.update()
        rate = self.recipe.lr * learning_rate(self.recipe, step)
        if len(self.data) > 1:
            terms[f"loss_{self._source(step)}"] = terms["loss"]
        return {**terms, "lr": rate, "gradient_norm": norm, "seconds": time.monotonic() - begun}, stopped

    def _load(self, step: int) -> list[Batch]:
        """This process's part of the batches of a step, augmented. Runs in a background thread."""
        dataset, loaded = self.data[int(self.plan.datasets[step])], []
        for micro, places in enumerate(self.plan.places(step)):
            mine = shard(list(enumerate(places.tolist())), *world())
            batch = Batch.cat([self._augmented(dataset[index], step, micro, slot) for slot, index in mine])
            loaded.append(replace(batch, source=self._source(step)))
        return loaded

    def _source(self, step: int) -> str:
        return self.recipe.data[int(self.plan.datasets[step])].called

    def _augmented(self, batch: Batch, step: int, micro: int, slot: int) -> Batch:
        return self.recipe.augment(batch, generator(self.recipe.seed, step, micro, slot, "augment"), self.keep)

    def _backward(self, step: int, batches: list[Batch]) -> dict[str, Tensor]:
        """Gradients of the accumulated batches; the mean of each named term."""
        total: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            # What draws from the global generator, such as dropout, is a function of the step too.
            torch.manual_seed(key(self.recipe.seed, step, micro, self.fabric.global_rank, "dropout"))
            batch = with_absent_layers(self.encoder, batch) if world()[1] > 1 else batch
            held = Held(batch.to(self.fabric.device), generator(self.recipe.seed, step, micro, "objective"))
            more_follow = micro + 1 < len(batches)
            with self.fabric.no_backward_sync(self.module, enabled=more_follow and world()[1] > 1):
                terms = self.module(held)
                self.fabric.backward(terms["loss"] / len(batches))
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + value.detach().double().mean() / len(batches)
        return total

    def _reduced(self, terms: Mapping[str, Tensor], stop: Stop) -> tuple[dict[str, float], bool]:
        """Terms of the global batch, and whether any process was asked to stop: all then stop after the same step."""
        mine = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        if world()[1] == 1:
            return mine, stop.asked
        everyone: list[Any] = [None] * world()[1]
        torch.distributed.all_gather_object(everyone, (mine, stop.asked))
        names = dict.fromkeys(name for found, _ in everyone for name in found)
        mean = {n: sum(found.get(n, 0.0) for found, _ in everyone) / len(everyone) for n in names}
        return mean, any(asked for _, asked in everyone)

    def _refuse_non_finite(self, step: int, terms: Mapping[str, float]) -> None:
        bad = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
        if bad:
            parts = [b for b in bad if not b.startswith("loss ")] or bad
            raise NonFiniteError(f"step {step + 1}: loss term {', '.join(parts)}. {self._advice(step)}")

    def _clip(self, step: int) -> float:
        given = [p for p in self.trained if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(given, self.recipe.clip or math.inf))
        if not math.isfinite(norm):
            names = [self.names[p] for p in given if not torch.isfinite(p.grad).all()] or ["their norm"]  # type: ignore[arg-type]
            raise NonFiniteError(
                f"step {step + 1}: the gradient is not finite in {', '.join(names[:5])}. {self._advice(step)}"
            )
        return norm

    def _advice(self, step: int) -> str:
        source = self.recipe.data[int(self.plan.datasets[step])].name
        places = ", ".join(str(i) for batch in self.plan.places(step) for i in batch[:16].tolist())
        return (
            f"The batch has places {places} of {source}: look for values out of range there; otherwise lower lr, set clip, or "
            f"take precision fp32. Nothing of this step was applied"
        )

    def _broken(self) -> dict[str, dict[int, str]]:
        """What could not be read, by dataset and place, where the recipe lets places be skipped. Of the first process."""
        every = [
            *zip(self.recipe.data, self.data, strict=True),
            *zip(self.recipe.validation, self.validation, strict=False),
        ]
        return {source.called: d.broken for source, d in every if isinstance(d, Tolerant) and d.broken}

    # --- validation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses over the validation places and the task's metrics, of the averaged weights if there are any. The draws
        are the same each time. Every process looks at all places, so that there is nothing to gather."""
        task = self.objective if isinstance(self.objective, Task) and hasattr(self.objective, "pairs") else None
        metrics = {n: m.to(self.fabric.device) for n, m in task.metrics().items()} if task else {}
        total: dict[str, float] = {}
        self.trainee.eval()
        with alone(), self.average.in_place() if self.average is not None else nullcontext():
            for number, batch in enumerate(self._validation_batches()):
                for name, value in self._validate(number, batch.to(self.fabric.device), task, metrics).items():
                    total[name] = total.get(name, 0.0) + float(value) * len(batch)
        places = sum(map(len, self.validation))
        losses = {f"validation_{name}": value / places for name, value in total.items()}
        return {**losses, **{f"validation_{name}": float(metric.compute()) for name, metric in metrics.items()}}

    def _validation_batches(self) -> Iterator[Batch]:
        names = [source.called for source in self.recipe.validation] or [""] * len(self.validation)
        for name, dataset in zip(names, self.validation, strict=True):
            for batch in in_order(dataset, self.recipe.batch_size):
                yield replace(batch, source=name)

    def _validate(self, number: int, batch: Batch, task: Any, metrics: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch; ``metrics`` are updated."""
        torch.manual_seed(key(self.recipe.seed, number, "validation"))
        with self.fabric.autocast():
            terms = self.objective(self.encoder, batch, generator(self.recipe.seed, number, "validation"))
            if metrics:
                pairs = task.pairs(task.predict(task.features(self.encoder, batch), batch), batch)
                for metric in metrics.values() if len(pairs[1]) else ():  # a batch may have no label at all
                    metric.update(*pairs)
        return terms

    # --- files -------------------------------------------------------------------------------------------------------

    @property
    def _checkpoint_file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def _objective_file(self) -> Path:
        return self.folder / "objective.safetensors"

    def _first_step(self) -> int | None:
        """The step to begin with, with its state restored; None when the run in the folder is complete."""
        before = None if self.restart else manifest.read(self.folder / "run.json")
        if self.restart or before is None:
            self.fabric.barrier()
            if self.leads:
                self.folder.mkdir(parents=True, exist_ok=True)
                for name in ("checkpoint.safetensors", "run.json"):
                    (self.folder / name).unlink(missing_ok=True)
            self.fabric.barrier()
            return 0
        self._refuse_other_recipe(before)
        self.fabric.barrier()
        if before.get("status") == "complete" and (self.folder / "weights.safetensors").is_file():
            return None
        if not self._checkpoint_file.is_file():
            return 0
        saved, facts = checkpoint.load(self._checkpoint_file)
        optimizer = {n: t for n, t in saved.items() if n.startswith("optimizer.")}
        checkpoint.restore(self._tensors(), {n: t for n, t in saved.items() if n not in optimizer})
        checkpoint.restore_optimizer(self.adam, self.names, optimizer)
        return int(facts["step"])

    def _tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds but the optimiser's state, as it is."""
        names = [self.names[p] for p in self.trained]
        values = self.average.values if self.average is not None else []
        return {
            **checkpoint.tensors_of(self.trainee, "trainee."),
            **{f"average.{name}": value for name, value in zip(names, values, strict=False)},
        }

    def _refuse_other_recipe(self, before: Mapping[str, Any]) -> None:
        mine = self.recipe.plain()
        try:
            old = Recipe.parse(before.get("recipe")).plain()  # with the defaults of fields that there were not yet
        except RecipeError:
            old = {}
        differ = sorted(k for k in {*mine, *old} - FREE_TO_CHANGE if mine.get(k) != old.get(k))
        if differ:
            raise RecipeError(
                f"{self.folder} holds a run of another recipe: {', '.join(differ)} differ. Choose another out, or restart it"
            )
        hashes = [manifest.fingerprint(d) for d in self.data]
        if before.get("data_hashes", hashes) != hashes:
            raise RecipeError(
                f"{self.folder} holds a run on other data: they have changed since. Choose another out, or restart it"
            )

    def _facts(self, first: int) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "kind": "training",
            "recipe": recipe.plain(),
            "seed": recipe.seed,
            "data_hashes": [manifest.fingerprint(d) for d in self.data],
            "places": [len(d) for d in self.data],
            "initial_weights_sha256": manifest.sha256(weights.located(recipe.model.weights))
            if recipe.model.weights
            else None,
            "resumed_at_step": first,
            "device": str(self.fabric.device),
            "processes": self.fabric.world_size,
            "parameters": sum(p.numel() for p in self.trainee.parameters()),
            "trained_parameters": sum(p.numel() for p in self.trained),
        }

    def _save_checkpoint(self, step: int) -> None:
        if self.leads:
            tensors = {**self._tensors(), **checkpoint.optimizer_tensors(self.adam, self.names)}
            checkpoint.save(self._checkpoint_file, tensors, {"step": step})
        self.fabric.barrier()

    def _save_weights(self) -> None:
        """The encoder and the task, with their contract; what another objective learned goes to a file of its own."""
        facts = {"source": "trained", "run": self.recipe.name, "recipe": self.recipe.plain()}
        task = self.objective if isinstance(self.objective, Task) else None
        weights.save(self.folder / "weights.safetensors", self.objective.exported(self.encoder), task, facts)
        if task is None:
            checkpoint.save(self._objective_file, checkpoint.tensors_of(self.objective, ""), {})

    def _finished(self) -> Run:
        """The run that lies complete in the folder."""
        path, log = self.folder / "weights.safetensors", Logbook.read(self.folder)
        if isinstance(self.objective, Task):
            return Run(self.recipe, *weights.load_task(path), log)
        lora.merge(self.objective)  # an objective may hold a copy of the encoder, which was saved merged
        checkpoint.restore(checkpoint.tensors_of(self.objective, ""), checkpoint.load(self._objective_file)[0])
        return Run(self.recipe, weights.load(path), self.objective.eval(), log)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
