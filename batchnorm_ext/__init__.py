"""Batch normalisation near the memory limit, as a drop-in for torch's.

`batch_norm` is `torch.nn.functional.batch_norm` with an optional residual and activation;
`BatchNorm1d/2d/3d` and `LazyBatchNorm1d/2d/3d` replace the modules of the same name in
`torch.nn`; `BatchNormAct1d/2d/3d` fuse an activation; `convert_batchnorm` and
`revert_batchnorm` exchange the modules of a whole model; `fuse_batchnorm` and `unfuse_batchnorm`
join its batch norms with the activations and adds that follow, `fusion_report` says which;
`compare` measures what that brings for a model; `decompositions` takes exported programs to torch's
own operators. `SyncBatchNorm`, `SyncBatchNormAct`, `convert_sync_batchnorm` and
`revert_sync_batchnorm` take the statistics of several processes together. `memory` is about what
large outputs on the CPU are kept in.
"""

from batchnorm_ext import memory
from batchnorm_ext._version import __version__
from batchnorm_ext.comparing import compare
from batchnorm_ext.comparison import Comparison
from batchnorm_ext.control import (
    accumulate_statistics,
    freeze_batchnorm,
    set_policies,
    unfreeze_batchnorm,
)
from batchnorm_ext.convert import (
    convert_batchnorm,
    convert_sync_batchnorm,
    revert_batchnorm,
    revert_sync_batchnorm,
)
from batchnorm_ext.export import decompositions
from batchnorm_ext.functional import batch_norm
from batchnorm_ext.fuse import FusionReport, fuse_batchnorm, fusion_report, unfuse_batchnorm
from batchnorm_ext.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from batchnorm_ext.policies import Policies
from batchnorm_ext.sync_modules import SyncBatchNorm, SyncBatchNormAct

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "Comparison",
    "FusionReport",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Policies",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "__version__",
    "accumulate_statistics",
    "batch_norm",
    "compare",
    "convert_batchnorm",
    "convert_sync_batchnorm",
    "decompositions",
    "freeze_batchnorm",
    "fuse_batchnorm",
    "fusion_report",
    "memory",
    "revert_batchnorm",
    "revert_sync_batchnorm",
    "set_policies",
    "unfreeze_batchnorm",
    "unfuse_batchnorm",
]
