"""For the site's build: figures beside torch, made from the result files.

A page has a line `<!-- figures: NAME -->` for each table or picture, and no number of its own. NAME
is a function below; it is called with all results that lie in benchmarks/results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

RESULTS = "benchmarks/results"
MARK = re.compile(r"<!-- figures: (\w+) -->")
DIRECTIONS = ("forward", "backward", "eval")
LAYOUTS = {"channels_first": "channels-first", "channels_last": "channels-last"}
OPS = {"bn": "BN", "bn_relu": "BN + ReLU", "bn_add_relu": "BN + add + ReLU"}
NETWORKS = {"cnn": "residual CNN", "mlp": "MLP", "transformer": "transformer with batch norm"}
PENALTIES = {
    "none": "no activation",
    "leaky_relu": "leaky_relu",
    "silu": "silu",
    "critic": "critic of a DCGAN, with convolutions",
}
#: No speed-up is claimed where the ranges between the quartiles overlap.
UNDECIDED = " ~"

Result = dict[str, Any]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by mkdocs with each page's text."""
    if not MARK.search(markdown):
        return markdown
    results = read(Path(config.config_file_path).parent)
    return MARK.sub(lambda mark: FIGURES[mark[1]](results), markdown)


def read(root: Path) -> list[Result]:
    """The committed results, each with its file's name."""
    paths = sorted((root / RESULTS).glob("*.json"))
    return [{**json.loads(path.read_text()), "name": path.name} for path in paths]


def of(results: Iterable[Result], what: str) -> list[Result]:
    """Those of one command: a preset, or a training experiment."""
    keys = ("preset", "experiment")
    found = [r for r in results if what in [r["settings"].get(key) for key in keys]]
    assert found, f"no result of {what} in {RESULTS}"
    return found


def processor(result: Result) -> str:
    """As its maker calls it, without what stands behind every name."""
    name = str(result["environment"]["cpu"]["Model name"])
    return re.sub(r"\(R\)| Processor", "", name).strip()


def times(ratio: float, decided: bool = True) -> str:
    """How many times as fast as torch."""
    return f"{ratio:.2f}" + ("" if decided else UNDECIDED)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """In Markdown; the first `words` columns are text, the others numbers."""
    line = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, line, *rows))


def sources(results: Iterable[Result]) -> str:
    """Where, when and with what a table was measured, and the file."""
    lines = []
    for result in results:
        environment, settings = result["environment"], result["settings"]
        threads = settings.get("threads")
        count = threads[0] if isinstance(threads, list) else threads
        facts = [
            f"{processor(result)}, {environment['cpu']['CPU(s)']} cores",
            f"torch {environment['torch']}",
            f"`{environment['batchnorm_ext']['cpu_capability']}` kernels",
            *([f"{count} thread{'s' * (count > 1)}"] if count else []),
            result["created"][:10],
            f"[result file](../{RESULTS}/{result['name']})",
        ]
        lines.append(f"- {', '.join(facts)}")
    return "\n".join(lines)


def summaries(result: Result, **want: str) -> dict[tuple[str, str], Result]:
    """Against eager torch, by layout and direction."""
    return {
        (row["layout"], row["direction"]): row["speedup"]["eager"]
        for row in result["summary"]
        if all(row[key] == value for key, value in want.items())
    }


def bars(results: list[Result]) -> str:
    """The picture of the first page: means over a ResNet-50's batch norms."""
    measured = [
        (result, summaries(result, op="bn", dtype="float32")) for result in of(results, "resnet50")
    ]
    longest = max(row["geometric_mean"] for _, rows in measured for row in rows.values())
    lines = []
    for layout, direction in [(la, d) for la in LAYOUTS for d in DIRECTIONS]:
        lines.append(f"<dt>{direction}, {LAYOUTS[layout]}</dt>")
        for i, (result, rows) in enumerate(measured):
            mean = rows[layout, direction]["geometric_mean"]
            lines.append(
                f'<dd class="bar bar-{i}" style="--share: {mean / longest:.3f}" '
                f'title="{escape(processor(result))}"><span>{mean:.1f}</span></dd>'
            )
    legend = "".join(
        f'<span class="bar-{i}">{escape(processor(result))}</span>'
        for i, (result, _) in enumerate(measured)
    )
    cases = max(row["cases"] for _, rows in measured for row in rows.values())
    return (
        f'<figure class="bars" style="--one: {1 / longest:.3f}">\n<figcaption>Times as fast as '
        f"torch's <code>BatchNorm2d</code>: the {cases} batch norms of a ResNet-50, float32, "
        f"geometric means. The line is torch.<br>{legend}</figcaption>\n"
        f"<dl>\n{''.join(lines)}\n</dl>\n</figure>"
    )


def slowest(results: list[Result]) -> str:
    """One sentence: the worst of these cases on each processor."""
    worst = [
        f"{times(min(row['worst'] for row in summaries(result, op='bn').values()))} on the "
        f"{processor(result)}"
        for result in of(results, "resnet50")
    ]
    speeds = " and ".join(worst)
    return f"Not every shape gains: the slowest case has a speed of {speeds}, torch's being 1."


def resnet50(results: list[Result]) -> str:
    """Mean and worst over a ResNet-50's shapes."""
    found = of(results, "resnet50")
    rows = []
    for result in found:
        measured = summaries(result, op="bn", dtype="float32")
        for layout, name in LAYOUTS.items():
            cells = [
                f"**{times(row['geometric_mean'])}** ({times(row['worst'])})"
                for row in (measured[layout, direction] for direction in DIRECTIONS)
            ]
            rows.append([processor(result), name, *cells])
    return table(["", "", "forward, training", *DIRECTIONS[1:]], rows, 2) + "\n\n" + sources(found)


def shapes(results: list[Result]) -> str:
    """Each of these shapes by itself."""
    parts = []
    for result in of(results, "resnet50"):
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for case in result["cases"]:
            speed = case["speedup"]["eager"]
            row = rows.setdefault((case["shape"], LAYOUTS[case["layout"]]), {})
            row[case["direction"]] = times(speed["ratio"], speed["decided"])
        lines = [[*key, *(row[direction] for direction in DIRECTIONS)] for key, row in rows.items()]
        text = table(["input", "layout", *DIRECTIONS], lines, 2)
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        parts.append(f'??? note "Each shape, {processor(result)}"\n\n{indented}')
    return "\n\n".join(parts)


def fused(results: list[Result]) -> str:
    """The fused operators against torch's separate ones, and bfloat16."""
    found = of(results, "quick")
    kinds = [("bn_relu", "float32"), ("bn_add_relu", "float32"), ("bn", "bfloat16")]
    rows = []
    for op, dtype in kinds:
        for layout, name in LAYOUTS.items():
            measured = [summaries(result, op=op, dtype=dtype) for result in found]
            cells = [
                f"**{times(row['geometric_mean'])}** ({times(row['worst'])})"
                for rows_of in measured
                for row in (rows_of[layout, direction] for direction in DIRECTIONS)
            ]
            rows.append([OPS[op], dtype, name, *cells])
    heads = [f"{processor(result)}, {direction}" for result in found for direction in DIRECTIONS]
    return table(["", "", "", *heads], rows, 3) + "\n\n" + sources(found)


def training(results: list[Result]) -> str:
    """A whole training step."""
    found = of(results, "against-torch")
    rows = []
    for result in found:
        for key, timings in result["timings"].items():
            torchs = timings["torch"]
            cells = [
                times(torchs["median"] / ours["median"], torchs["q1"] > ours["q3"])
                for ours in (timings["converted"], timings["fused"])
            ]
            rows.append([NETWORKS[key], f"{1e3 * torchs['median']:.2f} ms", *cells])
    return table(["", "torch's", "converted", "fused"], rows, 1) + "\n\n" + sources(found)


def penalty(results: list[Result]) -> str:
    """Backward with create_graph=True, and backward through it."""
    found = of(results, "penalty")
    cells: dict[str, dict[tuple[str, str], list[float]]] = {}
    for result in found:
        for case in result["penalty"]:
            row = cells.setdefault(case["what"], {})
            row.setdefault((case["dtype"], case["layout"]), []).append(case["speedup"]["ratio"])
    columns = [(dtype, layout) for dtype in ("float32", "bfloat16") for layout in LAYOUTS]
    rows = [
        [PENALTIES[what], *(_range(row.get(column, [])) for column in columns)]
        for what, row in cells.items()
    ]
    heads = [f"{dtype}, {LAYOUTS[layout]}" for dtype, layout in columns]
    return table(["", *heads], rows, 1) + "\n\n" + sources(found)


def _range(ratios: list[float]) -> str:
    if not ratios:
        return ""
    low, high = times(min(ratios)), times(max(ratios))
    return low if low == high else f"{low} to {high}"


def networks(results: list[Result]) -> str:
    """Steps of whole networks, and of what they consist beside convolutions and matrix products."""
    texts = []
    for preset in ("networks", "networks-compiled"):
        rows = []
        for row in (row for result in of(results, preset) for row in result["networks"]):
            torchs = _outside_products(row, "torch")
            cells = [f"{1e3 * row['timings']['torch']['median']:.0f} ms", f"{1e3 * torchs:.0f} ms"]
            for way in ("converted", "fused"):
                speedup = row["speedup"][way]
                cells.append(times(speedup["ratio"], speedup["decided"]))
                cells.append(f"{_outside_products(row, way) / torchs:.2f}")
            words = (row["network"], LAYOUTS[row["layout"]], row["dtype"])
            rows.append([*words, *cells])
        heads = ("step", "of it outside products")
        more = ("converted", "outside products", "fused", "outside products")
        head = ["", "", "", *(f"torch's {name}" for name in heads), *more]
        title = "Compiled" if preset.endswith("compiled") else "Eager"
        made = table(head, rows, 3)
        texts += [f"{title}:", made, sources(of(results, preset))]
    return "\n\n".join(texts)


def _outside_products(row: dict[str, Any], way: str) -> float:
    return sum(s for kind, s in row["operators"][way].items() if kind != "products")


def small_calls(results: list[Result]) -> str:
    """The time of a module's call that has next to nothing to compute."""
    found = of(results, "resnet50")
    rows = [
        [
            processor(result),
            row["direction"].replace("+", " and "),
            *(f"{1e6 * row['timings'][who]['median']:.1f} us" for who in ("eager", "ours")),
            times(1 / row["ours_over_eager"], row["decided"]),
        ]
        for result in found
        for row in result["host_time"]
    ]
    return table(["", "", "torch's", "this package's", "times as fast"], rows, 2)


def kept(results: list[Result]) -> str:
    """What stays in memory between forward and backward."""
    shares: dict[str, dict[str, str]] = {}
    for row in of(results, "resnet50")[-1]["saved_bytes"]:
        share = f"{row['total'] / row['tensor_bytes']:.2f}"
        shares.setdefault(OPS[row["op"]], {})[row["candidate"]] = share
    rows = [[op, row["eager"], row["ours"]] for op, row in shares.items()]
    return table(["", "torch's", "this package's"], rows, 1)


FIGURES: dict[str, Callable[[list[Result]], str]] = {
    function.__name__: function
    for function in (
        *(bars, slowest, resnet50, shapes, fused),
        *(training, networks, penalty, small_calls, kept),
    )
}
