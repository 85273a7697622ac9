"""What may happen to a batch norm in production: an overflow, and a last batch of one.

python examples/policies.py
"""

from __future__ import annotations

import copy

import torch

import batchnorm_ext as bx


def main() -> None:
    """Prints running statistics after an overflow, and the outputs for a batch of one."""
    torch.manual_seed(0)
    default = bx.BatchNorm1d(4)
    careful = copy.deepcopy(default)
    bx.set_policies(careful, nonfinite_statistics="skip", single_value="running")

    batch = torch.randn(8, 4, dtype=torch.float16)
    batch[0, 1] = float("inf")  # a half-precision activation that overflowed
    for name, norm in (("default", default), ("skip", careful)):
        norm(batch)
        values = [round(value, 2) for value in norm.get_buffer("running_mean").tolist()]
        print(f"nonfinite_statistics, {name:<8} running_mean: {values}")

    last = torch.randn(1, 4)
    try:
        default(last)
    except ValueError as error:
        print(f"single_value, default:  {error}")
    values = [round(value, 2) for value in careful(last).flatten().tolist()]
    print(f"single_value, running:  {values}")
    bx.set_policies(careful, single_value="zero_variance")
    print(f"single_value, zero_variance:  {careful(last).flatten().tolist()}")


if __name__ == "__main__":
    main()
