"""The bytes that an operation must move at least, and what that makes of a measured time.

T is the size of the input in bytes. Counted is what no implementation can avoid when it starts
with its arguments in memory and leaves its results there: each tensor once. Vectors with one
value per channel are left out (a few kilobytes), which makes the fraction smaller, not larger.
A channel too large for the cache has to be read twice; that is not counted either, so the
fraction of such a shape cannot reach 1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Formula:
    """`tensors` times T plus `mask_bits` bits per element, and why."""

    tensors: int
    mask_bits: int
    reason: str

    def __str__(self) -> str:
        return f"{self.tensors}T" + (" + 1 bit per element" if self.mask_bits else "")


FORMULAS: dict[tuple[str, str], Formula] = {
    ("bn", "forward"): Formula(2, 0, "read x, write y"),
    ("bn_relu", "forward"): Formula(
        2, 0, "read x, write y; backward can recompute the mask from x, which it reads anyway"
    ),
    ("bn_add_relu", "forward"): Formula(
        3,
        1,
        "read x and the residual, write y and the mask: without it backward would have to read "
        "the residual or y, a whole T",
    ),
    ("bn", "eval"): Formula(2, 0, "read x, write y"),
    ("bn_relu", "eval"): Formula(2, 0, "read x, write y"),
    ("bn_add_relu", "eval"): Formula(3, 0, "read x and the residual, write y; no backward follows"),
    ("bn", "backward"): Formula(3, 0, "read dy and x, write dx"),
    ("bn_relu", "backward"): Formula(3, 0, "read dy and x (the mask follows from x), write dx"),
    ("bn_add_relu", "backward"): Formula(
        4, 1, "read dy, x and the mask, write dx and the residual's gradient"
    ),
}


def tensor_bytes(numel: int, itemsize: int) -> int:
    """T: the bytes of one tensor of the input's size."""
    return numel * itemsize


def compulsory_bytes(op: str, direction: str, numel: int, itemsize: int) -> int:
    """The least number of bytes that `op` moves in `direction`."""
    formula = FORMULAS[op, direction]
    mask = -(-numel * formula.mask_bits // 8)
    return formula.tensors * tensor_bytes(numel, itemsize) + mask


def copy_bytes(numel: int, itemsize: int) -> int:
    """The bytes that a copy of the input moves: T read and T written."""
    return 2 * tensor_bytes(numel, itemsize)


def fraction_of_limit(moved_bytes: int, seconds: float, copied_bytes: int, copy_s: float) -> float:
    """Bandwidth of the operation over bandwidth of the copy: (bytes / time) / (bytes / time)."""
    return (moved_bytes / seconds) / (copied_bytes / copy_s)
