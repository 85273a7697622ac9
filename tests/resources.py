"""What nvcc makes of the CUDA kernels, as tables: registers, spills, shared memory of each, and how
wide its accesses are.

    python tests/resources.py          # compiles csrc/cuda, warnings as errors; build/resources.csv
                                       # and, of 9.0's PTX, build/accesses.csv
    python tests/resources.py --turn 3 # of the files of kernels one for all architectures, half of
                                       # the others for 9.0

`make nvcc-check` calls it and test_resources.py reads the table. A file that has not changed is not
compiled again.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from setup_cuda import NVCC_FLAGS  # noqa: E402

CSRC = ROOT / "csrc"
TABLE = ROOT / "build" / "resources.csv"
ACCESSES = ROOT / "build" / "accesses.csv"
LOGS = ROOT / "build" / "nvcc"
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;11.0;12.0+PTX"
ALWAYS = "9.0"
# As the files of the kernels are named.
KERNELS = [f"kernels_{way}_{dtype}" for way in ("forward", "backward")
           for dtype in ("float", "double", "bfloat16", "half")]  # fmt: skip
FLAGS = [*NVCC_FLAGS, "-I", str(CSRC), "-Xptxas=-v", "-Werror=all-warnings"]
FLAGS += ["-Xcompiler=-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"]


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on one architecture: of a thread, and of a block's memory."""

    architecture: str  # "sm_90"
    kernel: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int


@dataclass(frozen=True)
class Accesses:
    """Loads and stores of global memory in a kernel's PTX: of 16 bytes, and others but of bytes."""

    kernel: str
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int


def entries(ptx: str) -> dict[str, str]:
    """The kernels' instructions by their names."""
    parts = re.split(r"^(?:\.\w+ )*\.entry (\w+)\(", ptx, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def accesses_of(kernel: str, instructions: str) -> Accesses:
    """Counted. The mask's are of bytes, and left out."""
    words = re.findall(r"\b(ld|st)\.global((?:\.\w+)+)", instructions)
    counts = {
        (what, wide): sum(
            bool(re.search(r"\.v4\.\w32|\.v2\.\w64", how)) is wide and not how.endswith("8")
            for word, how in words
            if word == what
        )
        for what in ("ld", "st")
        for wide in (True, False)
    }
    return Accesses(
        kernel,
        counts["ld", True],
        counts["ld", False],
        counts["st", True],
        counts["st", False],
    )


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's arguments for "7.5;9.0+PTX"."""
    flags = []
    for word in architectures.split(";"):
        number = word.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if word.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def parse(log: str) -> list[Resources]:
    """The kernels in what ptxas says with -v."""
    parts = re.split(r"Compiling entry function '(\S+)' for '(\S+)'", log)[1:]
    return [
        Resources(
            architecture,
            kernel,
            _number(r"Used (\d+) registers", text),
            _number(r"(\d+) bytes stack frame", text),
            _number(r"(\d+) bytes spill stores", text),
            _number(r"(\d+) bytes spill loads", text),
            _number(r"(\d+) bytes smem", text),
        )
        for kernel, architecture, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]


def readable(names: Sequence[str]) -> list[str]:
    """Demangled, where there is a c++filt; the parameters left out, the folders' namespaces too."""
    program = shutil.which("c++filt")
    if program is None or not names:
        return list(names)
    result = subprocess.run([program], input="\n".join(names), capture_output=True, text=True)
    short = []
    for line in result.stdout.splitlines():
        namespaces = r"batchnorm::(cuda::)?|\(anonymous namespace\)::|^void "
        name = re.sub(namespaces, "", line).rpartition("(")[0] or line
        short.append(re.sub(r"\((\w+)\)(\d+)", r"\1=\2", name))
    return short


def _newest(paths: Iterable[Path]) -> float:
    return max(path.stat().st_mtime for path in paths)


def ptx_of(source: Path) -> Path:
    """Where its PTX is kept, of the architecture that is always compiled for."""
    return LOGS / f"{source.stem}.ptx"


def keep_ptx(source: Path, intermediate: Path) -> None:
    """From nvcc's intermediate files, which are many. The only architecture's has a plain name."""
    number = ALWAYS.replace(".", "")
    names = [f"{source.stem}.compute_{number}.ptx", f"{source.stem}.ptx"]
    found = [intermediate / name for name in names if (intermediate / name).exists()]
    if found:
        found[0].replace(ptx_of(source))
    shutil.rmtree(intermediate)


def compile_one(source: Path, flags: Sequence[str]) -> str:
    """What nvcc and ptxas say of a file. Raises SystemExit where nvcc refuses it."""
    log = LOGS / f"{source.stem}.log"
    intermediate = LOGS / f"{source.stem}.intermediate"
    command = ["nvcc", *FLAGS, *flags, "-x", "cu", "-c", str(source), "-o", os.devnull]
    command += ["--keep", "--keep-dir", str(intermediate)]
    headers = [path for part in ("core", "cuda") for path in (CSRC / part).glob("*.*h")]
    first_line = " ".join(command)
    if log.exists() and log.stat().st_mtime > _newest([source, Path(__file__), *headers]):
        kept, _, rest = log.read_text().partition("\n")
        if kept == first_line:
            return rest
    intermediate.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, capture_output=True, text=True)
    keep_ptx(source, intermediate)
    if result.returncode != 0:
        raise SystemExit(f"{first_line}\n{result.stdout}{result.stderr}")
    log.write_text(f"{first_line}\n{result.stderr}")
    print(f"nvcc {source.relative_to(ROOT)}", flush=True)
    return result.stderr


def write(rows: Sequence[Resources] | Sequence[Accesses], path: Path) -> None:
    """The table as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path) -> list[Resources]:
    """What `write` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Resources(row[0], row[1], *map(int, row[2:])) for row in list(csv.reader(file))[1:]]


def read_accesses(path: Path) -> list[Accesses]:
    """What `write` wrote of them."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Accesses(row[0], *map(int, row[1:])) for row in list(csv.reader(file))[1:]]


def of_turn(turn: int) -> str:
    """The file that is compiled for all architectures."""
    return KERNELS[turn % len(KERNELS)]


def architectures_of(source: Path, architectures: str, turn: int | None) -> str:
    """Those that a file is compiled for, or none. All files of kernels have the same source, for
    other dtypes: every other one, of both directions, shows what becomes of it."""
    if turn is None or source.stem not in KERNELS or source.stem == of_turn(turn):
        return architectures
    return ALWAYS if (KERNELS.index(source.stem) - turn) % 2 == 0 else ""


def main() -> None:
    """Compiles every file, for all architectures where it is its turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--architectures", default=ARCHITECTURES)
    parser.add_argument("--turn", type=int, help="that of one file; without, all have theirs")
    parser.add_argument("--output", type=Path, default=TABLE)
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("*** SKIPPED: no nvcc, the CUDA kernels are NOT COMPILED for any GPU")
        return
    if arguments.turn is not None:
        print(
            f"turn {arguments.turn}: {of_turn(arguments.turn)} for all architectures; left out "
            f"today: the other kernels for any but {ALWAYS}, and half of them for that, too"
        )

    def architectures_for(source: Path) -> str:
        return architectures_of(source, arguments.architectures, arguments.turn)

    def log_of(source: Path) -> str:
        return compile_one(source, architecture_flags(architectures_for(source)))

    # The slow ones first. csrc/core is compiled by nvcc, too: the kernels include it.
    sources = sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: "kernels_" not in path.name)
    sources += sorted((CSRC / "core").glob("*.cpp"))
    sources = [path for path in sources if architectures_for(path)]
    jobs = max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        logs = list(pool.map(log_of, sources))
    rows = parse("".join(logs))
    names = readable([row.kernel for row in rows])
    values = [asdict(row) | {"kernel": name} for row, name in zip(rows, names, strict=True)]
    write([Resources(**each) for each in values], arguments.output)
    found = entries("".join(ptx_of(path).read_text() for path in sources if ptx_of(path).exists()))
    names = readable(list(found))
    counted = [accesses_of(name, ptx) for name, ptx in zip(names, found.values(), strict=True)]
    write(counted, ACCESSES)
    spills = sum(row.spill_stores + row.spill_loads > 0 for row in rows)
    most = max((row.registers for row in rows), default=0)
    print(
        f"{len(rows)} kernels, at most {most} registers, {spills} with spills: {arguments.output}"
    )


if __name__ == "__main__":
    main()
