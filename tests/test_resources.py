"""What nvcc makes of the CUDA kernels (tests/resources.py): no spills, not too many registers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import resources
from resources import Resources

#: Kernels that may spill, by their names: so many bytes a thread, on other devices than sm_90. With
#: columns a thread has eight channels' values in its 128 registers. More registers would mean one
#: block less on a multiprocessor, and cost more than a few words from the first-level cache do.
SPILLS = {r"_kernel<(float|BFloat16|Half), Mapping=1,": 64}

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9batchnorm4cuda5firstIfEEvPKf' for 'sm_75'
ptxas info    : Function properties for _ZN9batchnorm4cuda5firstIfEEvPKf
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 8 bytes cumulative stack size, 352 bytes cmem[0]
ptxas info    : Compile time = 945.194 ms
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers, 1024 bytes smem
"""


def test_what_ptxas_says_is_understood(tmp_path: Path) -> None:
    rows = resources.parse(LOG)
    assert rows == [
        Resources("sm_75", "_ZN9batchnorm4cuda5firstIfEEvPKf", 96, 8, 12, 16, 0),
        Resources("sm_90", "second", 18, 0, 0, 0, 1024),
    ]
    resources.write(rows, tmp_path / "table.csv")
    assert resources.read(tmp_path / "table.csv") == rows


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_names_for_people() -> None:
    kernel = "_ZN9batchnorm4cuda14forward_kernelIfLNS_7MappingE1ELNS_6AccessE0ELb1EEEv"
    kernel += "NS0_16ForwardArgumentsE"
    inner = "_ZN9batchnorm4cuda12_GLOBAL__N_16kernelENS1_9ArgumentsE"
    assert resources.readable([kernel, inner, "second"]) == [
        "forward_kernel<float, Mapping=1, Access=0, true>",
        "kernel",
        "second",
    ]


def test_architectures_as_nvcc_has_them() -> None:
    assert resources.architecture_flags("7.5;12.0+PTX") == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.fixture(scope="module")
def table() -> list[Resources]:
    if not resources.TABLE.exists():
        why = "make nvcc-check makes it" if shutil.which("nvcc") else "there is no nvcc"
        pytest.skip(f"THE CUDA KERNELS' SPILLS ARE NOT CHECKED: no {resources.TABLE}, {why}")
    return resources.read(resources.TABLE)


def test_the_table_is_of_these_kernels(table: list[Resources]) -> None:
    everything = {f"sm_{w.removesuffix('+PTX').replace('.', '')}"
                  for w in resources.ARCHITECTURES.split(";")}  # fmt: skip
    architectures: dict[str, set[str]] = {}
    for row in table:
        architectures.setdefault(row.kernel, set()).add(row.architecture)
    assert len(table) == sum(map(len, architectures.values()))
    assert len(architectures) >= 60
    # `--turn` leaves some kernels to other days, but one architecture.
    assert everything in architectures.values()
    assert all(of in (everything, {"sm_90"}) for of in architectures.values())


def test_each_dtype_has_its_turn() -> None:
    source = resources.CSRC / "cuda" / "kernels_forward_double.cu"
    assert resources.architectures_of(source, "8.0;9.0", None) == "8.0;9.0"
    turns = [resources.architectures_of(source, "8.0;9.0", turn) for turn in range(5)]
    assert turns == ["9.0", "8.0;9.0", "9.0", "9.0", "9.0"]
    launcher = source.with_name("launch_forward.cu")
    assert resources.architectures_of(launcher, "8.0;9.0", 0) == "8.0;9.0"


def allowed_to_spill(row: Resources) -> int:
    if row.architecture == "sm_90":
        return 0
    return max((most for name, most in SPILLS.items() if re.search(name, row.kernel)), default=0)


def test_no_kernel_spills(table: list[Resources]) -> None:
    spilling = [
        row for row in table if max(row.spill_stores, row.spill_loads) > allowed_to_spill(row)
    ]
    assert not spilling, "\n".join(map(str, spilling))


def test_as_many_blocks_fit_as_the_plan_counts_on(table: list[Resources]) -> None:
    """Two blocks of 256 threads on a multiprocessor, of 64 K registers; one in double."""
    too_many = [
        row
        for row in table
        if row.registers > (255 if "double" in row.kernel else 128)
        and row.kernel.startswith(("forward_kernel", "backward_kernel"))
    ]
    assert not too_many, "\n".join(map(str, too_many))
