"""What a batch norm does where torch's leaves no choice; each is opt-in, the default is torch's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

__all__ = ["Policies"]


@dataclass(frozen=True)
class Policies:
    """The choices of one module, its attribute `policies`; `set_policies` sets those of a model.

    Attributes:
        nonfinite_statistics: what the mean or variance of a channel of the mini-batch does to the
            running statistics where it is infinite or NaN. "update" (torch): it goes into them, for
            good. "skip": that channel's running statistics stay as they are, decided on the device,
            without synchronising; the output is what it is, and `num_batches_tracked` counts on.
        single_value: a mini-batch with one value per channel in training mode. "error" (torch).
            "running": it is normalised with the running statistics, which do not move, as in eval
            mode. "zero_variance": its variance is 0, so that the output is `bias` (with residual
            and activation) and the gradient of the input 0; `running_mean` moves, `running_var`
            does not, since one value has no unbiased variance.
        recomputation: a forward pass that runs while a backward pass does, which is how
            `torch.utils.checkpoint` computes activations again. "update" (torch): the running
            statistics move again, and `num_batches_tracked` with them. "skip": they moved in the
            first forward pass, and stay.

    Raises:
        ValueError: for any other value.

    Examples:
        ```python
        norm = batchnorm_ext.BatchNorm2d(16)
        norm.policies = batchnorm_ext.Policies(nonfinite_statistics="skip")
        ```
    """

    nonfinite_statistics: Literal["update", "skip"] = "update"
    single_value: Literal["error", "running", "zero_variance"] = "error"
    recomputation: Literal["update", "skip"] = "update"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(hints[field.name])
            if value not in allowed:
                known = ", ".join(map(repr, allowed))
                raise ValueError(f"{field.name} should be one of {known}, but got {value!r}")

    def flags(self) -> tuple[bool, bool, bool]:
        """The operator's last arguments."""
        return (
            self.nonfinite_statistics == "skip",
            self.recomputation == "skip",
            self.single_value == "zero_variance",
        )


#: torch's own behaviour.
DEFAULT = Policies()
