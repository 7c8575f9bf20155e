"""The mean over processes of losses and of gradients is that of the global batch."""

from __future__ import annotations

import copy
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from everysat.nn.batchnorm import GlobalBatchNorm, over_processes
from everysat.nn.gather import gather_rows, global_mean, row_offset

SIZES = (3, 1)


def contrast(z: torch.Tensor) -> torch.Tensor:
    s = z @ z.T
    return (torch.logsumexp(s, 1) - s.diagonal().roll(1)).mean()


def values() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(sum(SIZES), 5, generator=g), torch.randn(5, 4, generator=g)


def own_rows_loss(z: torch.Tensor) -> torch.Tensor:
    everything, offset = gather_rows(z)
    own = torch.logsumexp(z @ everything.T, 1) - (z * everything.roll(1, 0)[offset : offset + len(z)]).sum(1)
    return global_mean(own)


LOSSES = {"all": lambda z: contrast(gather_rows(z)[0]), "own": own_rows_loss}


def work(rank: int, port: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(SIZES), timeout=timedelta(seconds=60)
    )
    x, w = values()
    start = sum(SIZES[:rank])
    x = x[start : start + SIZES[rank]]
    result = {"offset": row_offset(len(x)), "empty": global_mean(x[:0])}
    for name, loss in LOSSES.items():
        weight = w.clone().requires_grad_()
        value = loss(x @ weight)
        value.backward()
        for tensor in (value, weight.grad):
            tensor = tensor.detach()
            dist.all_reduce(tensor)
        result[name] = (value.detach() / len(SIZES), weight.grad / len(SIZES))
    norm = GlobalBatchNorm(5)
    x = x.clone().requires_grad_()
    normed = norm(100 + x)
    global_mean(normed**3).backward()
    result["norm"] = (normed.detach(), x.grad, norm.running_mean, norm.running_var)
    x = x.detach()
    result["weighted"] = global_mean(x, (x > 0).float())
    dist.all_reduce(result["weighted"])
    result["weighted"] /= len(SIZES)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("gather")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(work, (port, str(folder)), nprocs=len(SIZES), start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))]


@pytest.mark.parametrize("name", list(LOSSES))
def test_mean_over_processes_is_the_loss_and_gradient_of_the_global_batch(results, name):
    x, w = values()
    w.requires_grad_()
    loss = LOSSES[name](x @ w)
    loss.backward()
    for result in results:
        torch.testing.assert_close(result[name][0], loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result[name][1], w.grad, rtol=1e-5, atol=1e-6)


def test_offsets_and_means_over_unequal_parts(results):
    assert [r["offset"] for r in results] == [0, 3]
    x, _ = values()
    for result in results:
        torch.testing.assert_close(result["weighted"], x[x > 0].mean())
        assert result["empty"] == 0


def test_batch_norm_is_that_of_the_global_batch(results):
    x, _ = values()
    x.requires_grad_()
    norm = torch.nn.BatchNorm1d(5)
    normed = norm(100 + x)
    (normed**3).mean().backward()
    parts = zip(x.detach().split(SIZES), normed.detach().split(SIZES), x.grad.split(SIZES), results, strict=True)
    for _, out, grad, result in parts:
        torch.testing.assert_close(result["norm"][0], out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result["norm"][1] / len(SIZES), grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(result["norm"][2], norm.running_mean)
        torch.testing.assert_close(result["norm"][3], norm.running_var, rtol=1e-4, atol=1e-5)


def test_without_processes_nothing_is_added():
    x, _ = values()
    everything, offset = gather_rows(x)
    assert everything is x
    assert offset == row_offset(4) == 0
    torch.testing.assert_close(global_mean(x), x.mean())


def test_batch_norm_of_one_process_is_torch_s():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), torch.nn.BatchNorm1d(3))
    other = copy.deepcopy(plain)
    over_processes(other)
    assert isinstance(other[1], GlobalBatchNorm)
    assert other.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(4, 2, 5)
    for mode in (True, False):
        torch.testing.assert_close(other.train(mode)(x), plain.train(mode)(x), rtol=0, atol=0)
