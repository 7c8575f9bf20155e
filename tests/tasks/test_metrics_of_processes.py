"""Metrics of two processes, each of which saw a part of the places, are those of one that saw all."""

from __future__ import annotations

import multiprocessing
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from made_predictions import made, tasks

SHARES = (((1, 3, 2), (2, 1, 2)), ((3, 2, 4),))
"""Seed, places and number of classes of the batches of each process: two of few classes here, one of all there."""


def metrics_after(name: str, task, batches) -> dict[str, float]:
    metrics = task.metrics()
    for seed, rows, kinds in batches:
        prediction, batch = made(name, task, seed, rows, kinds=kinds)
        for metric in metrics.values():
            metric.update(*task.pairs(prediction, batch))
    return {key: float(metric.compute()) for key, metric in metrics.items()}


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = {name: metrics_after(name, task, SHARES[rank]) for name, task in tasks().items()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["everysat.tasks.change", "everysat.tasks.detect", "everysat.tasks.regress"])
    started = [context.Process(target=work, args=(rank, port, str(folder))) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(90)
    assert [process.exitcode for process in started] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["classify", "several", "regress", "change", "detect"])
def test_two_processes_compute_the_metrics_of_one(found, name):
    task = tasks()[name]
    whole = metrics_after(name, task, sum(SHARES, ()))
    for each in found:
        assert each[name] == pytest.approx(whole, rel=1e-5)
    parts = [metrics_after(name, task, share) for share in SHARES]
    assert all(any(abs(part[key] - whole[key]) > 1e-3 for part in parts) for key in whole)
