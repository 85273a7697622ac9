"""The programs in examples/: each runs, shows what it is there to show, and stands on a page.

They run in another folder than the project's, as a user's programs do.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import batchnorm_ext

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))

#: What the output has to match, somewhere and over lines: the point of each example.
SHOWN = {
    "accumulate.py": (
        r"one batch +updates: 1, (running_var: [\d.]+)\ndefault +updates: 8, (?!\1).*\n"
        r"accumulated +updates: 1, \1\n"
    ),
    "averaged_weights.py": r"last model's statistics: loss \d.*\nfresh .*\nbatches in them: 4\n",
    "checkpointing.py": (
        r"torch +batches counted: 2, (.*)\ndefault +batches counted: 2, \1\n"
        r"\S+=skip +batches counted: 1, .* 0\.0000\n"
    ),
    "compile_and_export.py": (
        r"batches counted: 1\n"
        r"((plain|loaded|packaged): largest difference (0\.0|\d\.\de-0[6-9]).*\n){3}"
    ),
    "convert.py": (
        r"torch\.nn\S+BatchNorm2d: loss .*\nbatchnorm_ext\.modules\.BatchNorm2d: loss .*\n"
        r"torch\.nn\S+BatchNorm2d: loss .*\nthe same parameters: True\nthe same .* keys: True\n"
    ),
    "ddp_digits.py": (
        r"epoch 1: .*\nepoch 2: .*\nepoch 3: [89]\d\.\d% right\n"
        r"2 processes, the same statistics in each: True\n"
    ),
    "distributed_data_parallel.py": (
        r"^weight is the same in both processes: True\n(.*: True\n){3}num_batches_tracked.*True\n$"
    ),
    "ensemble.py": r"batches seen: 30 30 30 30 30\n.*\nthe same statistics: True\n",
    "export_onnx.py": (
        r"operators: Conv Relu .*\n(batch of \d+: largest difference (0\.0|\d\.\de-0[6-9]).*\n){2}"
    ),
    "freeze.py": (
        r"6\.42 MB\n.* 3\.21 MB\n.* 0\.10 MB\n"
        r"frozen: 0 batches counted, trains \[\]\nunfrozen: trains \['weight', 'bias'\]\n"
    ),
    "fuse_resnet.py": (
        r"fused     6\.bn2: relu\(norm \+ residual\)(.*\n)*"
        r"loss of torch's.*\n+(.*times as fast\n){3}"
    ),
    "gradient_penalty.py": (
        r"gradient is torch's: True\n(step \d+: distance \d+\.\d+, penalty 0\.\d+\n){3}"
    ),
    "mixed_precision.py": (
        r"bfloat16 out, torch\.float32 weight, torch\.float32 running_var\n.*scale 1 -> 1\n"
        r"norm: torch\.float16 out, torch\.float32 weight, torch\.float32 running_var\n"
    ),
    "policies.py": (
        r"default +running_mean: \[.*inf.*\]\n.*skip +running_mean: (?!.*inf).*\n"
        r"single_value, default: +Expected more than 1 value.*\n.*running: .*\n"
        r".*zero_variance: +\[0\.0, 0\.0, 0\.0, 0\.0\]\n"
    ),
    "resnet18_step_by_step.py": (
        r"fused     4\.bn2: relu\(norm \+ residual\)\n(.*\n)*"
        r"a training step .*\ntorch's .* 1\.00x .*\n"
        r"((converted|fused|.*channels_last) .*\dx +\S+\n){4}"
    ),
    "sharded.py": r"bfloat16, running_var torch\.float32\nweight torch\.float32, 4 of 8 here\n",
}
#: How an example is started that is for several processes.
LAUNCHERS = {
    "ddp_digits.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
}
#: What makes an example shorter.
OPTIONS = {
    "fuse_resnet.py": ["--steps", "1"],
    "resnet18_step_by_step.py": ["--steps", "1", "--batch", "2", "--size", "64", "--no-compile"],
}
#: What makes processes or a process group of its own, or compiles. The others run in this process,
#: which has imported torch already.
ALONE = {"compile_and_export.py", "ddp_digits.py", "distributed_data_parallel.py", "sharded.py"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert name in SHOWN, "say in SHOWN what it prints"
    path = str(ROOT / "examples" / name)
    monkeypatch.chdir(tmp_path)
    if name in ALONE:
        output = output_of_process(*LAUNCHERS.get(name, []), path)
    else:
        monkeypatch.setattr(sys, "argv", [path, *OPTIONS.get(name, [])])
        torch.set_num_threads(1)
        runpy.run_path(path, run_name="__main__")
        output = capsys.readouterr().out
    assert re.search(SHOWN[name], output), output


def output_of_process(*arguments: str) -> str:
    """What this Python prints, with the project on its path only where it is not installed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if installed() is None:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def installed() -> str | None:
    """The version of the package where any folder's programs import this project's, else None."""
    code = (
        "from importlib import metadata, util; spec = util.find_spec('batchnorm_ext');"
        "print(spec.origin if spec else '', metadata.version('batchnorm_ext') if spec else '')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    origin, _, version = done.stdout.strip().rpartition(" ")
    return version if origin == str(ROOT / "batchnorm_ext" / "__init__.py") else None


def test_the_package_is_installed() -> None:
    version = installed()
    if version is None:
        pytest.skip("batchnorm_ext is built in place but not installed: `make build` does both")
    assert version.partition("+")[0] == batchnorm_ext.__version__


def test_every_example_stands_on_a_page() -> None:
    pages = [*(ROOT / "docs" / "workflows").glob("*.md"), ROOT / "docs" / "tutorial.md"]
    text = "".join(page.read_text() for page in pages)
    assert set(EXAMPLES) == set(re.findall(r"examples/([a-z]\w*\.py)", text))


def test_the_tutorial_shows_what_its_example_prints() -> None:
    """Each line is one that the program prints, and each step has one."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    program = (ROOT / "examples" / "resnet18_step_by_step.py").read_text()
    blocks = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert re.search(SHOWN["resnet18_step_by_step.py"], "\n".join(blocks)), blocks
    names = re.findall(r'^ +(?:models\[)?"([^"]+)"(?:: |\] = )', program, re.MULTILINE)
    assert len(names) == 7
    rows = re.findall(r"^(.+?) +\d+ ms +\d+ to \d+ ms +\d+\.\d\dx", "\n".join(blocks), re.MULTILINE)
    assert rows == names
