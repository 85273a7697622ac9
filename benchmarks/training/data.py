"""Real data that scikit-learn ships, cut in three by a fixed seed."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SPLIT_SEED = 0
TEST_SHARE = 0.2  # of all; the validation part is as large


@dataclass(frozen=True)
class Part:
    """Inputs (N, *) in float32 and their classes (N,)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def first(self, count: int) -> Part:
        """The first `count` of them; their order is that of the split, which is shuffled."""
        return Part(self.inputs[:count], self.targets[:count])

    def to(self, device: str) -> Part:
        """The same on a device."""
        return Part(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Split:
    """What is trained on, what a choice may look at, and what only the report looks at."""

    train: Part
    validation: Part
    test: Part

    def to(self, device: str) -> Split:
        """The same on a device."""
        return Split(*(part.to(device) for part in (self.train, self.validation, self.test)))


def _split(inputs: Tensor, targets: Tensor) -> Split:
    def cut(indices: list[int], share: float) -> list[list[int]]:
        classes = targets[indices].numpy()
        return train_test_split(indices, test_size=share, random_state=SPLIT_SEED, stratify=classes)

    rest, test = cut(list(range(len(targets))), TEST_SHARE)
    train, validation = cut(rest, TEST_SHARE / (1 - TEST_SHARE))
    return Split(*(Part(inputs[part], targets[part]) for part in (train, validation, test)))


@functools.cache
def digits() -> Split:
    """1,797 images (N, 1, 8, 8) of handwritten digits, pixels from -1 to 1; 10 classes."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return _split(pixels, torch.tensor(labels))


@functools.cache
def cancer(standardised: bool = False) -> Split:
    """569 cell samples (N, 30), raw: features between 0.001 and 4,254; 2 classes.

    `standardised`: each feature with the mean 0 and the variance 1 over the training part.
    """
    features, labels = load_breast_cancer(return_X_y=True)
    split = _split(torch.tensor(features, dtype=torch.float32), torch.tensor(labels))
    if not standardised:
        return split
    mean, std = split.train.inputs.mean(0), split.train.inputs.std(0)
    parts = (split.train, split.validation, split.test)
    return Split(*(Part((part.inputs - mean) / std, part.targets) for part in parts))
