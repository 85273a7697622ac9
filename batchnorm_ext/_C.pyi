"""Types of the compiled module (csrc/bindings/module.cpp, cuda_plans.h)."""

from typing import TypedDict

class Plan(TypedDict):
    scheme: str  # "columns", "planes" or "expanded"
    cooperative: bool
    stream: bool
    threads: int
    unit_channels: int
    fold: int
    group_rows: int
    second_reading: str  # where it finds its data: "none", "L2", "L3" or "memory"
    compulsory_bytes: int
    predicted_bytes: int

class PoolStatistics(TypedDict):
    in_use: int
    kept: int
    allocations: int
    reused: int

class CudaPlan(TypedDict):
    mapping: str  # "planes" or "columns"
    access: str  # "vector" or "scalar"
    strategy: str  # "block", "cluster", "grid", "two_kernels" or "single_pass"
    team: int
    slots: int
    stream_stores: bool
    refused: bool  # without cooperation, since a launch with it was refused
    unit_channels: int
    units: int
    units_at_once: int
    shared_bytes: int
    workspace_bytes: int
    compulsory_bytes: int
    predicted_bytes: int
    blocks: int

class CudaOccupancy(TypedDict):
    blocks: int  # of a multiprocessor
    clusters: dict[int, int]  # at once, by their size
    refused: bool

class CudaDevice(TypedDict):
    compute_capability: int  # 90 for 9.0
    multiprocessors: int
    threads_per_multiprocessor: int
    shared_per_block: int
    shared_per_multiprocessor: int
    reserved_shared: int
    l2: int
    max_cluster: int
    cooperative: bool

def build_info() -> dict[str, object]: ...
def cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> None: ...
def plan(
    layout: str,
    dtype: str,
    n: int,
    c: int,
    s: int,
    threads: int,
    op: str,
    masked: bool = False,
    residual: bool = False,
    outputs: int = 1,
) -> Plan: ...
def pool_statistics() -> PoolStatistics: ...
def set_pool_limit(limit: int | None) -> None: ...
def empty_pool() -> None: ...
def force_plan(
    *,
    scheme: str | None = None,
    cooperative: bool | None = None,
    stream: bool | None = None,
    threads: int | None = None,
    unit_channels: int | None = None,
    fold: int | None = None,
    group_rows: int | None = None,
) -> None: ...
def cuda_devices() -> dict[str, CudaDevice]: ...
def plan_cuda(
    layout: str,
    dtype: str,
    n: int,
    c: int,
    s: int,
    op: str,
    *,
    device: str | CudaDevice = "h100",
    reduces: bool | None = None,
    cumulative: bool = False,
    aligned: bool = True,
    residual: bool = False,
    masked: bool = False,
    outputs: int = 1,
    occupancy: CudaOccupancy | None = None,
    strategy: str | None = None,
    access: str | None = None,
    team: int | None = None,
    slots: int | None = None,
    unit_channels: int | None = None,
    units_at_once: int | None = None,
    stream_stores: bool | None = None,
) -> CudaPlan: ...
def force_cuda_plan(
    *,
    strategy: str | None = None,
    access: str | None = None,
    team: int | None = None,
    slots: int | None = None,
    unit_channels: int | None = None,
    units_at_once: int | None = None,
    stream_stores: bool | None = None,
) -> None: ...
