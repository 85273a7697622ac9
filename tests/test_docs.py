"""The documentation's sources; `make docs` builds the site, where every warning is an error."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import batchnorm_ext as bx

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"


def test_the_reference_has_every_public_name_once() -> None:
    pages = "\n".join(path.read_text() for path in sorted(REFERENCE.glob("*.md")))
    found = Counter(re.findall(r"^::: batchnorm_ext\.(\w+)$", pages, re.MULTILINE))
    assert {name: found[name] for name in bx.__all__} == dict.fromkeys(bx.__all__, 1)
