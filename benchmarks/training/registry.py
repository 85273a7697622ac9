"""Every experiment, in the order of the page."""

from __future__ import annotations

from benchmarks.training.against_torch import AgainstTorch
from benchmarks.training.covariate_shift import CovariateShift
from benchmarks.training.experiment import Experiment
from benchmarks.training.faster_training import FasterTraining
from benchmarks.training.gradient_flow import GradientFlow
from benchmarks.training.inference import Inference
from benchmarks.training.learning_rates import LearningRates
from benchmarks.training.placement import Placement
from benchmarks.training.regularisation import Regularisation

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        FasterTraining(),
        LearningRates(),
        GradientFlow(),
        CovariateShift(),
        Regularisation(),
        Inference(),
        Placement(),
        AgainstTorch(),
    )
}
