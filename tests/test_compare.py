"""`compare`: what it leaves as it was, what it measures, what it says of bad input; the command."""

from __future__ import annotations

import copy
import dataclasses
import io
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Network, images
from torch import Tensor, nn

import batchnorm_ext as bx
from batchnorm_ext import __main__, comparing
from batchnorm_ext.comparison import Candidate, Comparison, Norms
from batchnorm_ext.table import Column, number, render
from batchnorm_ext.trial import difference
from batchnorm_ext.turns import MAX_ROUNDS, MIN_ROUNDS, Quartiles, take_turns

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["torch", "converted", "fused"]


class Noisy(Network):
    """With dropout, so that random numbers matter, and inputs by position and by name."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, short: bool = False, scale: Tensor | None = None) -> Any:
        y = self.drop(super().forward(x, short))
        return {"y": y if scale is None else y * scale, "rest": [y.argmax(1)]}


def compared(model: nn.Module | None = None, inputs: Any = None, **options: Any) -> Comparison:
    x = images(0, dtype=torch.float32) if inputs is None else inputs
    return bx.compare(model or Noisy(), x, **{"rounds": 1, **options})


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts something else in the place of a way to change the model."""

    def put(name: str, way: Any) -> None:
        monkeypatch.setattr(comparing, "WAYS", {**comparing.WAYS, name: way})

    yield put


# --- the model stays as it is -------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[list[Any], dict[str, Tensor]]:
    """All that a comparison could leave changed: identities and modes, and values."""
    identities = [
        [(name, type(m), m.training, id(m), *hooks_of(m)) for name, m in model.named_modules()],
        [(n, id(p), p.requires_grad, id(p.grad)) for n, p in model.named_parameters()],
        random.getstate(),
    ]
    gradients = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    values = {**model.state_dict(), **gradients, "generator": torch.get_rng_state()}
    return identities, copy.deepcopy(values)


def hooks_of(module: nn.Module) -> list[list[int]]:
    return [list(module._forward_hooks), list(module._backward_hooks)]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_generators_stay(training: bool) -> None:
    model = Noisy().train(training)
    model.first.eval()
    model.head.weight.requires_grad_(False)
    model.conv.register_forward_hook(lambda *_: None)
    x = images(0, dtype=torch.float32).requires_grad_()
    model(x)["y"].sum().backward()
    before, data, slope = snapshot(model), x.detach().clone(), copy.deepcopy(x.grad)
    compared(model, x)
    after = snapshot(model)
    assert after[0] == before[0]
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)
    torch.testing.assert_close((x.detach(), x.grad), (data, slope), rtol=0, atol=0)


def test_inputs_that_the_model_writes_to_stay() -> None:
    x = images(0, dtype=torch.float32)
    before = x.clone()
    result = compared(nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(3)), x)
    assert result.compared and torch.equal(x, before)


def test_gradients_are_those_of_one_step(plant: Any) -> None:
    seen: list[bool] = []

    def watch(model: Any) -> nn.Module:
        model.register_forward_pre_hook(
            lambda *_: seen.append(any(p.grad is not None for p in model.parameters()))
        )
        return model

    plant("fused", watch)
    compared(rounds=3)
    assert seen and not any(seen)


def test_the_logger_speaks_again(caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.BatchNorm2d):
        pass

    compared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Own(4)))
    assert not caplog.records
    bx.convert_batchnorm(nn.Sequential(Own(4)))
    assert caplog.records


# --- what is measured ---------------------------------------------------------------------------


def test_every_candidate_has_every_figure() -> None:
    result = compared(rounds=3)
    assert [c.name for c in result.candidates] == NAMES
    assert result.compared
    for candidate in result.candidates:
        assert not candidate.error
        for times in (candidate.training, candidate.inference):
            assert times is not None and times.rounds == 3
            assert 0 < times.q1 <= times.median <= times.q3
        assert candidate.memory is not None and candidate.memory > 0
    torchs, *ours = result.candidates
    assert torchs.training_difference is None
    for candidate in ours:
        # Dropout in train mode: without the same random numbers the differences were of size 1.
        for found in (candidate.training_difference, candidate.eval_difference):
            assert found is not None and found.outputs < 1e-5 and found.gradients < 1e-5


def test_inputs_by_position_and_by_name() -> None:
    x, scale = images(0, dtype=torch.float32), torch.tensor(2.0)
    forms = [(x, False, scale), {"x": x, "scale": scale}, (x, {"scale": scale})]
    losses: list[list[float]] = []
    for inputs in forms:
        seen: list[float] = []

        def loss(outputs: Any, seen: list[float] = seen) -> Tensor:
            total = outputs["y"].square().sum()
            seen.append(float(total))
            return total

        assert compared(inputs=inputs, loss=loss).compared
        losses.append(seen)
    assert losses[0] == losses[1] == losses[2]


class Wrong(nn.BatchNorm2d):
    """A batch norm that is off by a given factor in one mode or the other."""

    factors = (1.0, 1.0)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factors[self.training]


@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_candidate_is_seen(training: bool, plant: Any) -> None:
    def spoil(model: nn.Module) -> nn.Module:
        assert isinstance(model, Noisy)
        model.second.__class__ = type(
            "Spoilt", (Wrong,), {"factors": (1.0, 1.01) if training else (1.01, 1.0)}
        )
        return model

    plant("converted", spoil)
    found = compared().candidates[1]
    right, wrong = found.eval_difference, found.training_difference
    if not training:
        right, wrong = wrong, right
    assert right is not None and wrong is not None
    assert right.outputs == right.gradients == 0
    assert wrong.outputs > 1e-4 and wrong.gradients > 1e-4


def test_a_wrong_gradient_alone_is_seen(plant: Any) -> None:
    def spoil(model: Any) -> nn.Module:
        model.head.weight.register_hook(lambda grad: grad * 1.5)
        return model

    plant("fused", spoil)
    found = compared().candidates[2].training_difference
    assert found is not None and found.outputs == 0 and found.gradients > 1e-3


def test_difference_by_its_definition() -> None:
    nan, inf = float("nan"), float("inf")
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([4.0, nan])
    assert difference([a, b], [a, b]) == 0
    assert difference([a + 1, b], [a, b]) == pytest.approx(1 / 4)
    assert difference([b, a], [a, a]) != difference([b, a], [a, a])  # nan
    assert difference([a], [torch.zeros(2)]) == inf
    assert difference([torch.zeros(0)], [torch.zeros(0)]) == 0
    with pytest.raises(ValueError, match="other shapes"):
        difference([a], [a, a])


def test_memory_is_what_backward_needs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    result = compared(model, torch.randn(2, 3, 64, 64))
    tensor = 2 * 4 * 64 * 64 * 4
    torchs, _, fused = (c.memory for c in result.candidates)
    assert torchs is not None and fused is not None
    # The convolution's output and the activation's, which is the model's; values per channel.
    assert 2 * tensor <= torchs < 2.1 * tensor and 2 * tensor <= fused < 2.1 * tensor


def test_which_batch_norms_were_found() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).sin()

    norms = compared(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), Own(4))
    ).norms
    assert norms.found == ("1", "3", "4")
    assert norms.converted == ("1", "3")
    assert norms.joined == ("1",)
    assert [(x.norm, "Own" in x.reason) for x in norms.left] == [("4", True)]
    assert [x.norm for x in norms.unjoined] == ["3"]


def test_a_converted_model_is_compared_with_torchs() -> None:
    model: Any = bx.fuse_batchnorm(Noisy())
    norms = compared(model).norms
    assert (norms.converted, norms.joined) == (("first", "second"), ("first", "second"))
    model.first.freeze()
    norms = compared(model).norms
    assert norms.found == norms.converted == ("second",)
    assert norms.left == (bx.fuse.Left("first", "this package's own in every row"),)


def test_compiled_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []

    def noted(model: nn.Module) -> nn.Module:
        calls.append(model)
        return model

    monkeypatch.setattr(torch, "compile", noted)
    result = compared(compile=True)
    assert [c.label for c in result.candidates] == NAMES + [f"{name}, compiled" for name in NAMES]
    assert len(calls) == 3 and all(c.training for c in result.candidates)
    assert max(map(len, str(result).splitlines())) <= 80


# --- turns --------------------------------------------------------------------------------------


def turns(rounds: int | None, seconds: float, step: float) -> dict[str, Quartiles]:
    ticks = iter(range(10**6))
    return take_turns(
        "ab", lambda key: None, lambda key: None, rounds=rounds, seconds=seconds,
        clock=lambda: next(ticks) * step, fail=lambda *_: None, say=lambda _: None,
    )  # fmt: skip


def test_rounds() -> None:
    assert {t.rounds for t in turns(3, 0.0, 1.0).values()} == {3}
    assert {t.rounds for t in turns(None, 0.0, 1.0).values()} == {MIN_ROUNDS}
    assert {t.rounds for t in turns(None, 1e9, 1.0).values()} == {MAX_ROUNDS}
    assert {t.median for t in turns(1, 0.0, 0.5).values()} == {0.5}


def test_quartiles() -> None:
    assert Quartiles.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Quartiles(3.0, 2.0, 4.0, 5)
    assert Quartiles(2, 1, 3, 5).overlaps(Quartiles(4, 3, 5, 5))
    assert not Quartiles(2, 1, 3, 5).overlaps(Quartiles(4, 3.5, 5, 5))


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1e-5, 0.0123, 123.4])
def test_the_table_fits(seconds: float) -> None:
    times = Quartiles(seconds, seconds * 0.99, seconds * 1.01, 9)
    apart = comparing.Difference(1.2e-16, 3.4e-5)
    made = [
        Candidate(name, compiled, times, times, 123_456_789_012, apart, apart, "E: " + 90 * "x")
        for compiled in (False, True)
        for name in NAMES
    ]
    left = tuple(bx.fuse.Left(f"layer{i}.norm", f"{90 * 'y'}{i % 9}") for i in range(99))
    norms = Norms(("a",) * 99, (), (), left, ())
    result = Comparison("M" * 99, norms, "kept " * 20, tuple(made))
    before: set[str] = set()
    for width in (24, 40, 60, 80):
        text = result.table(width)
        assert max(map(len, text.splitlines())) <= max(width, 40)
        headings = set(text.splitlines()[2].split())
        assert before <= headings
        before = headings
    assert {"quartiles", "gain", "MB", "outputs", "gradients"} <= before
    assert str(result) == result.table(80)


def test_a_narrow_table_loses_what_is_worth_least() -> None:
    columns = [Column("name", ["a"], 9), Column("x", ["1"], 2), Column("y", ["22"], 1)]
    assert render(columns, 80) == "name  x   y\na     1  22"
    assert render(columns, 10) == "name  x\na     1"
    assert render(columns, 1) == "name\na"


def test_numbers() -> None:
    shown = [number(x) for x in (0, 0.012346, 1.2344, 12.344, 123.46, 12345.6)]
    assert shown == ["0", "0.01235", "1.234", "12.34", "123.5", "12346"]


def test_gain_only_where_the_quartiles_are_apart() -> None:
    def made(name: str, median: float) -> Candidate:
        return Candidate(name, training=Quartiles(median, median - 0.5, median + 0.5, 9))

    rows = [made("torch", 4.0), made("converted", 3.5), made("fused", 2.0)]
    text = str(Comparison("M", Norms((), (), (), (), ()), "kept", tuple(rows)))
    assert "2.00x" in text and "~" in text.splitlines()[4] and "1.14x" not in text


# --- what goes wrong ----------------------------------------------------------------------------


def broken(model: nn.Module) -> nn.Module:
    raise torch.OutOfMemoryError("tried to allocate 20 GiB\nand more")


@pytest.mark.parametrize("name", NAMES)
def test_the_others_are_measured_where_one_raises(name: str, plant: Any) -> None:
    plant(name, broken)
    result = compared()
    for candidate in result.candidates:
        assert bool(candidate.error) is (candidate.name == name)
        assert bool(candidate.training and candidate.inference) is (candidate.name != name)
    assert f"{name}: OutOfMemoryError: tried to allocate 20 GiB\n" in str(result)
    assert result.compared is (name != "torch")


def test_one_that_raises_while_it_is_timed(plant: Any) -> None:
    def later(model: Any) -> nn.Module:
        calls = iter([None] * 4)
        model.register_forward_pre_hook(lambda *_: next(calls))
        return model

    plant("fused", later)
    result = compared(rounds=3)
    assert [bool(c.error) for c in result.candidates] == [False, False, True]
    assert [bool(c.inference) for c in result.candidates] == [True, True, False]


def refuse(outputs: Any) -> Tensor:
    raise KeyError("label")


@pytest.mark.parametrize(
    ("model", "inputs", "options", "message"),
    [
        (nn.Linear(2, 2), torch.ones(2, 2), {}, "batch norm modules of torch was required, Linear"),
        (bx.BatchNormAct2d(2), torch.ones(2, 2, 2, 2), {}, "has only this package's own"),
        (nn.BatchNorm1d(3), torch.ones(2, 4), {}, r"got float32 \(2, 4\): "),
        (nn.BatchNorm1d(3), torch.ones(2, 3).int(), {}, r"got int32 \(2, 3\): "),
        (nn.BatchNorm1d(3), torch.ones(2, 3), {"loss": lambda y: y}, "scalar outputs"),
        (nn.BatchNorm1d(3), torch.ones(2, 3), {"loss": refuse}, "KeyError: 'label'"),
        (nn.BatchNorm1d(3), torch.ones(2, 3), {"rounds": 0}, "rounds should be at least 1, got 0"),
    ],
)
def test_bad_input(model: nn.Module, inputs: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        compared(model, inputs, **options)
    assert "\n" not in str(caught.value)


def test_outputs_without_a_floating_point_tensor() -> None:
    class Counts(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).argmax(1)

    with pytest.raises(ValueError, match="floating-point tensor was required in the outputs"):
        compared(Counts(3), torch.ones(2, 3))


def test_a_model_that_cannot_be_copied() -> None:
    model: Any = Noisy()
    model.lines = (line for line in "ab")
    with pytest.raises(ValueError, match=r"copy\.deepcopy takes was required: TypeError"):
        compared(model)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def my_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with a class, a function, an instance, and things that are none of these."""
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, *more):\n"
        "        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), *more)\n"
        "def make():\n    return Net()\n"
        "def needy(width):\n    return Net()\n"
        "net, number, plain = Net(), 3, nn.Linear(2, 2)\n"
        "class Two(Net):\n    def forward(self, x, y):\n        return super().forward(x + y)\n"
    )
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    return tmp_path


def command(name: str, *words: str, sizes: str = "2,3,4,4") -> int:
    return __main__.main(["compare", name, "--input", sizes, "--rounds", "1", *words])


@pytest.mark.parametrize("name", ["Net", "make", "net"])
def test_the_command_prints_the_table(
    name: str, my_models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(f"my_models:{name}") == 0
    out, err = capfd.readouterr()
    assert out.startswith("Net, float32 (2, 3, 4, 4), cpu")
    assert "batch norms: 1; converted: 1; joined with what follows: 1\n" in out and err == ""
    assert {line.split()[0] for line in out.splitlines() if line} >= {*NAMES}


def test_the_commands_options(my_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", "2,3,4,4", "--dtype", "bfloat16", "--layout", "channels_last"]
    assert command("my_models:Two", *words) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.count("bfloat16 (2, 3, 4, 4) channels_last") == 2


def test_the_command_in_a_narrow_terminal(
    my_models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert command("my_models:Net") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 50


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("my_models", [], "MODULE:NAME was required, got 'my_models'"),
        ("no_such:Net", [], "no_such can't be imported: ModuleNotFoundError"),
        ("my_broken:Net", [], "my_broken can't be imported: ZeroDivisionError"),
        ("my_models:Nut", [], "my_models:Nut: my_models has no Nut"),
        ("my_models:number", [], "a torch.nn.Module was required, got int"),
        ("my_models:needy", [], "my_models:needy can't be called without arguments: TypeError"),
        ("my_models:plain", [], "batch norm modules of torch was required, Linear has none"),
        ("my_models:Two", [], "got float32 (2, 3, 4, 4): TypeError"),
        ("my_models:Net", ["--rounds", "0"], "rounds should be at least 1, got 0"),
    ],
)
def test_the_command_says_what_is_wrong(
    name: str, words: list[str], message: str, my_models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(name, *words) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("batchnorm_ext compare: ") and message in err


def test_a_device_that_is_not_there(
    my_models: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command("my_models:Net", "--device", "cuda") == 1
    assert "a CUDA device was required, torch finds none" in capfd.readouterr().err


def test_channels_last_needs_an_image(my_models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("my_models:Net", "--layout", "channels_last", sizes="2,3") == 1
    assert "channels_last needs an input of 4 or 5 sizes, got [(2, 3)]" in capfd.readouterr().err


@pytest.mark.parametrize("sizes", ["", "3x4", "3,0"])
def test_sizes_that_are_none(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("my_models:Net", sizes=sizes)
    assert "argument --input" in capsys.readouterr().err


def test_status_where_nothing_was_compared(
    my_models: Path, plant: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plant("torch", broken)
    assert command("my_models:Net") == 1
    assert "torch: OutOfMemoryError" in capsys.readouterr().out


def test_the_progress_line_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, speaks in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        compared()
        assert ("fused: first steps" in stream.getvalue()) is speaks
        assert "\n" not in stream.getvalue()


def test_in_a_process(my_models: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "batchnorm_ext", "compare", "my_models:Net", "--input", "2,3,4,4",
         "--rounds", "1"],
        cwd=my_models,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and "fused" in result.stdout


def test_the_result_is_plain_data() -> None:
    found = dataclasses.asdict(compared())
    assert set(found) == {"subject", "norms", "memory", "candidates"}
