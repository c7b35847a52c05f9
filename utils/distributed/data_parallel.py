"""Data-parallel training of a module: BatchNorm over all processes' samples, gradients averaged by DDP."""

import inspect
import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.distributed.collectives import all_reduce, tensor_group
from utils.distributed.processes import rank, world_size

# The compiler cannot look into collectives, and would cut the encoder at every BatchNorm. As custom operations they
# stay inside the graph. All processes compile the same graph, so that their collectives keep one order.


@torch.library.custom_op("soda::sum_over_processes", mutates_args=())
def _sum_over_processes(tensor: Tensor) -> Tensor:
    return all_reduce(tensor.clone())


@torch.library.custom_op("soda::gather_processes", mutates_args=())
def _gather_processes(tensor: Tensor) -> Tensor:
    """Collective. (...) -> (world_size, ...), as a sum over ranks: gloo cannot gather tensors that lie on a GPU."""
    everyone = tensor.new_zeros(world_size(), *tensor.shape)
    everyone[rank()] = tensor
    return all_reduce(everyone)


_sum_over_processes.register_fake(torch.empty_like)
_gather_processes.register_fake(lambda tensor: tensor.new_empty(world_size(), *tensor.shape))


class _Normalize(torch.autograd.Function):
    """weight (x - mean) / sqrt(variance + eps) + bias, where mean and variance are those of x over all processes.

    The gradient (Ioffe & Szegedy 2015, section 3), with x^ for the normalised x and averages over all processes:
    dx = weight / sqrt(variance + eps) (dy - average(dy) - x^ average(dy x^)).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float, count: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.count = eps, count
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        x, weight, mean, variance = ctx.saved_tensors
        inverse = (variance + ctx.eps).rsqrt()
        # As if mean and variance were constants: one kernel, and its sums are those that are needed.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, mean, inverse, False, ctx.eps, [True, True, True]
        )
        mean_dy, mean_dy_x = _sum_over_processes(torch.stack([dbias, dweight])) / ctx.count  # (C,) each
        slope = -weight * inverse.square() * mean_dy_x
        offset = -weight * inverse * mean_dy - slope * mean
        dx = dx + torch.addcmul(offset[:, None, None], slope[:, None, None], x)
        return dx.to(x.dtype), dweight, dbias, None, None, None, None


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all processes' samples, shares being equal.

    Collective in training mode: gathers mean and variance in the forward pass and sums gradients in the backward pass,
    in float32. torch's SyncBatchNorm synchronises with the device in every layer, and DDP refuses it on CPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        count = x.numel() // x.shape[1] * world_size()
        with torch.no_grad():
            moments = torch.stack(torch.var_mean(x.float(), dim=(0, 2, 3), correction=0))  # (2, C), of this process
            variances, means = _gather_processes(moments).unbind(dim=1)  # (world_size, C) each
            mean, variance = means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return _Normalize.apply(x, self.weight, self.bias, mean, variance, self.eps, count)


def convert_batch_norm(module: nn.Module) -> None:
    """Turn every BatchNorm2d in `module` into a GlobalBatchNorm2d, in place; its state and its keys stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = GlobalBatchNorm2d


class _DataParallel(DistributedDataParallel):
    """DDP that can accumulate gradients over a static graph.

    DDP learns the graph in its first backward pass, which therefore cannot go without reducing gradients: an internal
    assertion fails.
    """

    _has_reduced = False

    def no_sync(self) -> Any:
        if not self._has_reduced:
            self._has_reduced = True
            return nullcontext()
        return super().no_sync()


def data_parallel(module: nn.Module) -> nn.Module:
    """Collective. `module` wrapped by DDP, its BatchNorm converted in place; in a single process, `module` as it is."""
    if world_size() == 1:
        return module
    # DDP warns of 1x1 convolutions, whose gradients' strides differ only in dimensions of size 1.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    convert_batch_norm(module)
    # GlobalBatchNorm2d keeps the buffers equal, so that none need be sent. The argument's name depends on torch's
    # version.
    known = inspect.signature(DistributedDataParallel).parameters
    no_broadcast: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    return _DataParallel(
        module, process_group=tensor_group(), static_graph=True, gradient_as_bucket_view=True, **no_broadcast
    )
