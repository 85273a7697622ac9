"""Importing this skips a test module where the benchmarks' extra is not installed."""

import pytest

for _name in ("typer", "rich", "pandas", "tabulate", "matplotlib", "sklearn", "scipy", "joblib"):
    pytest.importorskip(_name, reason="the benchmarks need the extra 'bench'")
