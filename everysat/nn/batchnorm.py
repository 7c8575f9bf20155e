"""Batch normalisation over the batch of all processes, on any device (PyTorch's own synchronised version needs CUDA)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everysat.nn.gather import group, world


class RowNorm(nn.BatchNorm1d):
    """Batch normalisation that stands a batch of one row or of none, which has no variance: it is then normalised by the running statistics, which
    stay. A modality that only one place of a batch has makes such batches."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() <= input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class GlobalBatchNorm(_BatchNorm):
    """Same parameters, buffers and, with one process, same values as the torch layer that it stands for. In training, all
    processes must call it, if need be with an empty batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"input has {input.ndim} axes, expected at least [row, channel]")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world()[1] == 1:
            return super().forward(input)
        shape = (1, -1) + (1,) * (input.ndim - 2)
        with torch.autocast(input.device.type, enabled=False):
            x = input.float()
            axes = [axis for axis in range(x.ndim) if axis != 1]
            own = x.new_full((1,), x.numel() / max(x.shape[1], 1))
            total = _Sum.apply(torch.cat([x.sum(axes), own]))
            mean, count = total[:-1] / total[-1].clamp(min=1), total[-1].detach()
            # A second pass: squares less the squared mean would lose all digits of values far from zero.
            centred = x - mean.view(shape)
            variance = _Sum.apply(centred.square().sum(axes)) / count.clamp(min=1)
            self._follow(mean.detach(), variance.detach(), count)
            out = centred * torch.rsqrt(variance + self.eps).view(shape)
            if self.affine:
                out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Running statistics, with the unbiased variance, as torch keeps them; unchanged by an empty global batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None or count == 0:
            return
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), rate)


def over_processes(module: nn.Module) -> None:
    """Every batch normalisation inside ``module`` becomes one over all processes. Names, parameters and buffers stay."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, GlobalBatchNorm):
            again = GlobalBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            again.__dict__.update({key: child.__dict__[key] for key in ("_parameters", "_buffers", "training")})
            setattr(module, name, again)
        else:
            over_processes(child)


class _Sum(torch.autograd.Function):
    """Sum over processes; the gradient is the sum of theirs, since the loss of each depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group())
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=group())
        return grad
