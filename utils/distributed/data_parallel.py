"""Data-parallel training of a module: BatchNorm over the samples of all ranks, and gradients averaged by DDP."""

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

# torch.compile cannot trace collectives and would break the encoder's graph at every BatchNorm. Custom operators keep
# the collectives inside the graph. All ranks compile the same graph, so they run the collectives in the same order.


@torch.library.custom_op("soda::sum_over_processes", mutates_args=())
def _sum_over_processes(tensor: Tensor) -> Tensor:
    return all_reduce(tensor.clone())


@torch.library.custom_op("soda::gather_processes", mutates_args=())
def _gather_processes(tensor: Tensor) -> Tensor:
    """Collective. (...) -> (world_size, ...). Uses a sum over ranks, because gloo cannot gather tensors on a GPU."""
    everyone = tensor.new_zeros(world_size(), *tensor.shape)
    everyone[rank()] = tensor
    return all_reduce(everyone)


# The kernel of torch's BatchNorm is much faster on CPUs than torch.var_mean. It is a custom operator as well, because
# torch.compile cannot trace it with a batch size that changes.
@torch.library.custom_op("soda::moments", mutates_args=())
def _moments(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (2, C), float32: mean and variance of each channel, on this rank."""
    # These running statistics are not needed, but the kernel computes in their type.
    mean, variance = x.new_zeros(2, x.shape[1], dtype=torch.float32)
    return torch.stack(torch.batch_norm_update_stats(x, mean, variance, momentum=0.0))


_sum_over_processes.register_fake(torch.empty_like)
_gather_processes.register_fake(lambda tensor: tensor.new_empty(world_size(), *tensor.shape))
_moments.register_fake(lambda x: x.new_empty(2, x.shape[1], dtype=torch.float32))


class _Normalize(torch.autograd.Function):
    """weight (x - mean) / sqrt(variance + eps) + bias, with the mean and variance of x over all ranks.

    The gradient (Ioffe & Szegedy 2015, section 3), where x^ is the normalised x and averages are over all ranks:
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
        # This kernel treats mean and variance as constants, so that it computes the first term of dx. It also returns
        # the sums over the samples that the other terms need.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, mean, inverse, False, ctx.eps, [True, True, True]
        )
        mean_dy, mean_dy_x = _sum_over_processes(torch.stack([dbias, dweight])) / ctx.count  # (C,) each
        # The other terms are a linear function of x^, so the forward kernel computes them. In bfloat16, it is much
        # faster on CPUs than elementwise operations between tensors of different types.
        scale = -weight * inverse
        dx += F.batch_norm(x, mean, variance, scale * mean_dy_x, scale * mean_dy, training=False, eps=ctx.eps)
        return dx, dweight, dbias, None, None, None, None


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics cover the samples of all ranks. All ranks need the same number of samples.

    Collective in training mode: the forward pass gathers mean and variance, and the backward pass sums gradients, both
    in float32. torch's SyncBatchNorm is not used because it synchronises with the device in every layer, and because
    DDP refuses it on CPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised (N, C, H, W) for x (N, C, H, W)."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        count = x.numel() // x.shape[1] * world_size()
        with torch.no_grad():
            means, variances = _gather_processes(_moments(x)).unbind(dim=1)  # (world_size, C) each
            mean, variance = means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return _Normalize.apply(x, self.weight, self.bias, mean, variance, self.eps, count)


def convert_batch_norm(module: nn.Module) -> None:
    """Turns every BatchNorm2d in `module` into a GlobalBatchNorm2d, in place. State and state_dict keys are kept."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = GlobalBatchNorm2d


class _DataParallel(DistributedDataParallel):
    """DDP that can accumulate gradients with a static graph.

    DDP learns the graph in its first backward pass. If that pass does not reduce gradients, an internal assertion of
    DDP fails. The first call of `no_sync` therefore has no effect.
    """

    _has_reduced = False

    def no_sync(self) -> Any:
        if not self._has_reduced:
            self._has_reduced = True
            return nullcontext()
        return super().no_sync()


def data_parallel(module: nn.Module) -> nn.Module:
    """Collective. Returns `module` wrapped in DDP, after converting its BatchNorm layers in place.

    In a single process, returns `module` unchanged.
    """
    if world_size() == 1:
        return module
    # DDP warns about the gradients of 1x1 convolutions, whose strides differ from those of DDP's buckets. They differ
    # only in dimensions of size 1.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    convert_batch_norm(module)
    # GlobalBatchNorm2d keeps the buffers equal on all ranks, so DDP need not send them. The name of this argument
    # depends on the version of torch.
    known = inspect.signature(DistributedDataParallel).parameters
    no_broadcast: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    return _DataParallel(
        module, process_group=tensor_group(), static_graph=True, gradient_as_bucket_view=True, **no_broadcast
    )
