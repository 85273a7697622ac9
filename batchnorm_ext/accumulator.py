"""Statistics over several mini-batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["Accumulator"]


class Accumulator:
    """Count, mean and sum of squared deviations of each channel over the mini-batches so far.

    A mini-batch's statistics come out of the forward pass as running statistics of momentum 1, in
    buffers of float64 that stand in for the module's. They are combined by Chan, Golub and
    LeVeque's formula (1979), on the device and without synchronising.
    """

    def __init__(self, running_mean: Tensor) -> None:
        self.count, self.mean, self.m2 = (
            torch.zeros_like(running_mean, dtype=torch.float64) for _ in range(3)
        )
        self.batches = torch.zeros((), dtype=torch.int64, device=running_mean.device)

    def buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Stand-ins for running_mean, running_var and num_batches_tracked in one forward pass."""
        return torch.zeros_like(self.mean), torch.zeros_like(self.mean), self.batches.new_zeros(())

    @torch.no_grad()
    def add(
        self, n: int | Tensor, buffers: tuple[Tensor, Tensor, Tensor], skip_nonfinite: bool
    ) -> None:
        """Take in a mini-batch of `n` values per channel, from what the forward pass wrote.

        Its counter is 0 where the pass was a recomputation that was not to write, and so are they.
        """
        mean, variance, batches = buffers
        count = n * torch.ones_like(mean) * batches
        if skip_nonfinite:
            finite = mean.isfinite() & variance.isfinite()
            mean, variance, count = (v.where(finite, 0.0) for v in (mean, variance, count))
        total = self.count + count
        share = count / total.clamp(min=1)
        delta = mean - self.mean
        self.m2 += variance * (count - 1) + delta.square() * self.count * share
        self.mean += delta * share
        self.count.copy_(total)
        self.batches += batches

    @torch.no_grad()
    def move(self, module: _NormBase) -> None:
        """One update of the running statistics, by all that was taken in.

        A channel without a value stays as it is, as does the variance of a single value.
        """
        running_mean, running_var = module.running_mean, module.running_var
        assert running_mean is not None and running_var is not None
        counter = module.num_batches_tracked
        if counter is not None:
            counter += self.batches > 0
        if module.momentum is not None:
            factor = torch.full_like(self.mean, module.momentum)
        elif counter is not None:
            factor = 1.0 / counter.expand_as(self.mean)
        else:  # no count to average over: torch leaves the estimates alone
            return
        for running, batch, least in (
            (running_mean, self.mean, 1),
            (running_var, self.m2 / (self.count - 1), 2),
        ):
            moved = running.double().lerp(batch, factor.double())
            running.copy_(moved.where(self.count >= least, running.double()))
