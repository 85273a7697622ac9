"""The documentation: its sources, and the site that `make docs` makes of them."""

from __future__ import annotations

import ast
import functools
import html
import http.server
import importlib.util
import inspect
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import batchnorm_ext as bx

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
CLASSES = sorted(name for name in bx.__all__ if inspect.isclass(getattr(bx, name)))
#: What is searched for in a browser; each takes a second.
SEARCHED = ["BatchNorm2d", "batch_norm", "convert_batchnorm", "set_policies"]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


# ---- the sources -------------------------------------------------------------------------------


def test_the_reference_has_every_public_name_once() -> None:
    pages = "\n".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))
    found = Counter(re.findall(r"^::: batchnorm_ext\.(\w+)$", pages, re.MULTILINE))
    assert {name: found[name] for name in bx.__all__} == dict.fromkeys(bx.__all__, 1)


def examples_of(name: str) -> list[str]:
    """The blocks of code in a class's docstring."""
    text = inspect.getdoc(getattr(bx, name)) or ""
    return [
        textwrap.dedent(block) for block in re.findall(r"```python\n(.*?) *```", text, re.DOTALL)
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_an_example_that_runs(name: str) -> None:
    examples = examples_of(name)
    assert examples
    for example in examples:
        exec(example, {"torch": torch, "batchnorm_ext": bx})


def test_the_page_of_figures_has_no_number_of_its_own() -> None:
    text = re.sub(r"```.*?```|\(\S*\)", "", (DOCS / "figures.md").read_text(), flags=re.DOTALL)
    assert re.findall(r"\d+[.,]\d+", text) == []


# ---- the site ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as by `make docs`."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name}: make docs installs it")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def reference_of(site: Path, name: str) -> str:
    """What the reference says of a class, as HTML."""
    for page in sorted((site / "reference").rglob("index.html")):
        _, heading, rest = page.read_text().partition(f'<h2 id="batchnorm_ext.{name}"')
        if heading:
            return rest.partition("<h2 ")[0]
    raise AssertionError(f"{name} has no heading in the reference")


def arguments_of(signature: str) -> dict[str, tuple[bool, Any]]:
    """Of `Name(argument: type = default)`: whether by keyword alone, and the default."""
    tree = ast.parse(f"def {signature.strip()}: ...").body[0]
    assert isinstance(tree, ast.FunctionDef)
    found = tree.args
    missing = [None] * (len(found.args) - len(found.defaults))
    pairs = [
        *((a, False, d) for a, d in zip(found.args, [*missing, *found.defaults], strict=True)),
        *((a, True, d) for a, d in zip(found.kwonlyargs, found.kw_defaults, strict=True)),
    ]
    empty = inspect.Parameter.empty
    return {a.arg: (key, ast.literal_eval(d) if d else empty) for a, key, d in pairs}


@pytest.mark.parametrize("name", CLASSES)
def test_the_reference_shows_how_a_class_is_made(site: Path, name: str) -> None:
    shown = reference_of(site, name)
    signature = re.search(r'<div class="[^"]*doc-signature.*?</div>', shown, re.DOTALL)
    assert signature, "no signature"
    found = arguments_of(text_of(signature[0]))
    expected = {
        key: (argument.kind is argument.KEYWORD_ONLY, argument.default)
        for key, argument in inspect.signature(getattr(bx, name)).parameters.items()
    }
    if "bias" not in expected:  # torch 2.11
        found.pop("bias", None)
    assert found == expected
    for example in examples_of(name):
        assert example.strip() in text_of(shown)
    if issubclass(getattr(bx, name), torch.nn.Module):
        _, heading, listed = text_of(shown).partition("Parameters:")
        assert heading, "no list of arguments"
        for argument, (_, default) in found.items():
            of_default = "" if default is inspect.Parameter.empty else r", default:\s+\S+"
            assert re.search(rf"\b{argument}\s+\([^)]*{of_default}\s*\)\s+–\s+\S", listed), argument


def test_every_public_name_is_found_by_the_search(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {entry["location"]: entry for entry in index["docs"]}
    for name in bx.__all__:
        entries = [e for place, e in found.items() if place.endswith(f"#batchnorm_ext.{name}")]
        assert entries, f"{name} is no heading of the index"
        assert name in text_of(entries[0]["title"])


def test_the_figures_are_those_of_the_result_files(site: Path) -> None:
    page = text_of((site / "figures" / "index.html").read_text())
    assert "figures:" not in page
    files = sorted(RESULTS.glob("*-resnet50.json"))
    assert files
    for path in files:
        for row in json.loads(path.read_text())["summary"]:
            speed = row["speedup"]["eager"]
            assert f"{speed['geometric_mean']:.2f} ({speed['worst']:.2f})" in page, path.name


def test_the_first_page_begins_with_install_picture_and_figures(site: Path) -> None:
    first = (site / "index.html").read_text().partition("<h1")[2].partition("<h2")[0]
    code = text_of(first)
    assert "pip install ." in code
    assert '<figure class="bars"' in first
    for path in RESULTS.glob("*-resnet50.json"):
        rows = json.loads(path.read_text())["summary"]
        for row in rows:
            assert f"<span>{row['speedup']['eager']['geometric_mean']:.1f}</span>" in first
        assert f"{min(row['speedup']['eager']['worst'] for row in rows):.2f}" in code


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", page.read_text())
        loaded = [t for t in tags if 'rel="canonical"' not in t]
        assert not [t for t in loaded if re.search(r'(?:src|href)="?(?:https?:)?//', t)], page


# ---- in a browser ------------------------------------------------------------------------------

#: Shows each page in a frame of each width, searches for each name, and posts what was seen.
LOOK = """<!doctype html><script>
const pause = time => new Promise(done => setTimeout(done, time));
async function open(page, width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = page;
  await new Promise(done => { frame.onload = done; document.body.append(frame); });
  return frame;
}
async function look() {
  const seen = {widths: [], search: {}};
  for (const page of PAGES) for (const width of [400, 800, 1400]) {
    const frame = await open(page, width), root = frame.contentDocument;
    const without = () => [...root.querySelectorAll("pre > code")].filter(
      block => !block.parentElement.querySelector("button, nav")).length;
    for (let i = 0; without() && i < 50; i++) await pause(20);
    seen.widths.push([page, width, root.documentElement.scrollWidth, without()]);
    frame.remove();
  }
  for (const name of NAMES) {
    const frame = await open("/?q=" + name, 1400), root = frame.contentDocument;
    const found = () => [...root.querySelectorAll(".md-search-result__item a")].map(a => a.href);
    for (let i = 0; !found().length && i < 250; i++) await pause(20);
    seen.search[name] = found();
    frame.remove();
  }
  await fetch("/seen", {method: "POST", body: JSON.stringify(seen)});
}
window.onload = look;
</script><body>"""


@pytest.fixture(scope="module")
def seen(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser shows of the site; served, since the pages' scripts do not run from files."""
    if BROWSER is None:
        pytest.skip("no chromium")
    pages = sorted(f"/{path.parent.relative_to(site)}/" for path in site.rglob("index.html"))
    look = LOOK.replace("PAGES", json.dumps(pages)).replace("NAMES", json.dumps(SEARCHED))
    (site / "look.html").write_text(look)
    posted: queue.Queue[bytes] = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a frame that was removed before its page had come

    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = subprocess.Popen(
            [
                *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--disable-sync", "--disable-quic", "--remote-debugging-port=0"),
                f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
                f"http://127.0.0.1:{server.server_address[1]}/look.html",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            found: dict[str, Any] = json.loads(posted.get(timeout=240))
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    assert len(found["widths"]) == 3 * len(pages)
    return found


def test_no_page_is_wider_than_its_window(seen: dict[str, Any]) -> None:
    assert [row for row in seen["widths"] if row[2] > row[1]] == []


def test_all_code_has_a_button_to_copy_it(seen: dict[str, Any]) -> None:
    assert [row for row in seen["widths"] if row[3]] == []


@pytest.mark.parametrize("name", SEARCHED)
def test_the_search_finds_a_name_first(seen: dict[str, Any], name: str) -> None:
    """Its own heading in the reference is among the first three results."""
    first = seen["search"][name][:3]
    assert any(re.search(rf"#batchnorm_ext\.{name}$", place) for place in first), first
