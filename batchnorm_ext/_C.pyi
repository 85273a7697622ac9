"""Types of the compiled module (csrc/bindings/module.cpp)."""

from typing import TypedDict

class Plan(TypedDict):
    scheme: str  # "columns", "planes" or "expanded"
    cooperative: bool
    stream: bool
    threads: int
    unit_channels: int
    fold: int

def build_info() -> dict[str, object]: ...
def cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> None: ...
def plan(
    layout: str, dtype: str, n: int, c: int, s: int, threads: int, op: str, masked: bool = False
) -> Plan: ...
def force_plan(
    *,
    scheme: str | None = None,
    cooperative: bool | None = None,
    stream: bool | None = None,
    threads: int | None = None,
    unit_channels: int | None = None,
    fold: int | None = None,
) -> None: ...
