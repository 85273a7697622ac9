"""What nvcc makes of the CUDA kernels (tests/resources.py): no spills, not too many registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import resources
from resources import NVCC_FLAGS, Accesses, Resources

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


def compiled(turn: int | None) -> set[str]:
    """The files of kernels that `--turn` takes; without, all."""
    return {
        stem
        for stem in resources.KERNELS
        if resources.architectures_of(resources.CSRC / "cuda" / f"{stem}.cu", "8.0", turn)
    }


def of_each_file(names: Iterable[str]) -> Counter[str]:
    """How many of the kernels are of each file. Those of a turn, or of all files."""
    found = re.findall(r"^(forward|backward)_kernel<(\w+),", "\n".join(names), re.MULTILINE)
    count = Counter(f"kernels_{way}_{dtype.lower()}" for way, dtype in found)
    assert set(count) in [compiled(turn) for turn in (None, *range(len(resources.KERNELS)))]
    return count


def test_the_table_is_of_these_kernels(table: list[Resources]) -> None:
    everything = {f"sm_{w.removesuffix('+PTX').replace('.', '')}"
                  for w in resources.ARCHITECTURES.split(";")}  # fmt: skip
    architectures: dict[str, set[str]] = {}
    for row in table:
        architectures.setdefault(row.kernel, set()).add(row.architecture)
    assert len(table) == sum(map(len, architectures.values()))
    assert set(of_each_file(architectures).values()) == {8}
    # `--turn` leaves half of the kernels to other days, and of others all but one architecture.
    assert everything in architectures.values()
    assert all(of in (everything, {"sm_90"}) for of in architectures.values())


def test_each_file_of_kernels_has_its_turn() -> None:
    folder = resources.CSRC / "cuda"
    assert sorted(resources.KERNELS) == sorted(path.stem for path in folder.glob("kernels_*.cu"))
    source = folder / "kernels_forward_double.cu"
    assert resources.architectures_of(source, "8.0;9.0", None) == "8.0;9.0"
    turns = [resources.architectures_of(source, "8.0;9.0", turn) for turn in range(9)]
    assert turns == ["", "8.0;9.0", *["", "9.0"] * 3, ""]
    launcher = folder / "launch_forward.cu"
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


# ---- the compiler's PTX -------------------------------------------------------------------------

PTX = """
.visible .entry first(
	.param .u64 first_param_0
)
{
	ld.param.u64 	%rd1, [first_param_0];
	ld.global.v4.u32 	{%r1, %r2, %r3, %r4}, [%rd1];
	@%p1 ld.global.v2.f64 	{%fd1, %fd2}, [%rd1+16];
	ld.global.nc.u16 	%rs1, [%rd1];
	ld.global.u8 	%rs2, [%rd1];
	ld.volatile.f32 	%f1, [%rd1];
	// begin inline asm
	st.global.cs.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};
	// end inline asm
	st.global.u32 	[%rd1], %r1;
	st.global.u32 	[%rd1+4], %r2;
	ret;
}
	// .globl	second
.weak .entry second(
)
{
	ret;
}
"""


def test_accesses_are_counted() -> None:
    found = resources.entries(PTX)
    assert list(found) == ["first", "second"]
    assert resources.accesses_of("first", found["first"]) == Accesses("first", 2, 1, 1, 2)
    assert resources.accesses_of("second", found["second"]) == Accesses("second", 0, 0, 0, 0)


#: Stores and loads of fewer than 16 bytes that a kernel of vectors may have. A per-channel value is
#: one for each of the four dtypes, of which one is executed.
DTYPES = 4
FORWARD_STORES = 2 * DTYPES + 3 + 1 + 3  # running statistics; mean, invstd, m2; counter; a partial
BACKWARD_STORES = 2 * DTYPES + 3  # dweight, dbias; a partial result
#: Weight and bias, with a first pass and without; running statistics in inference and in training;
#: the counter, as what it is and to be counted up; the channel's first element, with a first pass
#: and without, and as the shift of each lane.
FORWARD_LOADS = 4 * DTYPES + 4 * DTYPES + 2 + 2
#: Weight and bias; mean and invstd, twice; three totals.
BACKWARD_LOADS = 2 * DTYPES + 2 * 2 + 3


@pytest.fixture(scope="module")
def accesses() -> list[Accesses]:
    if not resources.ACCESSES.exists():
        why = "make nvcc-check makes it" if shutil.which("nvcc") else "there is no nvcc"
        pytest.skip(f"THE WIDTH OF ACCESSES IS NOT CHECKED: no {resources.ACCESSES}, {why}")
    return resources.read_accesses(resources.ACCESSES)


def test_vector_kernels_move_tensors_by_16_bytes(accesses: list[Accesses]) -> None:
    """Or each of a warp's stores would touch all the sectors of four."""
    vector = [row for row in accesses if "Access=0" in row.kernel]
    assert set(of_each_file(row.kernel for row in vector).values()) == {4}
    for row in vector:
        forward, lanes = row.kernel.startswith("forward"), 8 if "Mapping=1" in row.kernel else 1
        assert row.wide_loads > 0 and row.wide_stores > 0, row
        assert row.narrow_stores <= (FORWARD_STORES if forward else BACKWARD_STORES), row
        assert row.narrow_loads <= (FORWARD_LOADS + lanes if forward else BACKWARD_LOADS), row


CLUSTER = """
#include "cuda/device.cuh"
using namespace batchnorm::cuda;
__global__ void arrive() { cluster_arrive(); }
__global__ void arrive_relaxed() { cluster_arrive_relaxed(); }
__global__ void wait() { cluster_wait(); }
__global__ void map(float* out) { *out = *in_block_of_cluster(dynamic_shared<float>(), 1); }
"""
INSTRUCTIONS = {
    "arrive": r"barrier\.cluster\.arrive(?!\.relaxed)",
    "arrive_relaxed": r"barrier\.cluster\.arrive\.relaxed",
    "wait": r"barrier\.cluster\.wait",
    "map": r"\bmapa\b",
}


@pytest.mark.skipif(
    shutil.which("nvcc") is None,
    reason="NO NVCC: CLUSTERS IN CODE FOR OLDER DEVICES ARE NOT CHECKED",
)
@pytest.mark.parametrize("architecture", [80, 90])
def test_code_without_clusters_traps(architecture: int, tmp_path: Path) -> None:
    """Newer devices run it, too: better an error there than blocks that do not meet."""
    source, output = tmp_path / "cluster.cu", tmp_path / "cluster.ptx"
    source.write_text(CLUSTER)
    command = ["nvcc", *NVCC_FLAGS, "-I", str(resources.CSRC), "-ptx", str(source)]
    command += [f"-arch=compute_{architecture}", "-o", str(output)]
    subprocess.run(command, check=True)
    found = resources.entries(output.read_text())
    assert len(found) == len(INSTRUCTIONS)
    for name, wanted in INSTRUCTIONS.items():
        (ptx,) = (
            text for mangled, text in found.items() if re.match(rf"_Z\d+{name}(v|Pf)$", mangled)
        )
        has_clusters = re.search(r"barrier\.cluster|mapa", ptx) is not None
        assert (re.search(r"\btrap\b", ptx) is not None) == (architecture < 90), name
        assert has_clusters == (architecture >= 90), name
        assert re.search(wanted, ptx) is not None or architecture < 90, name
