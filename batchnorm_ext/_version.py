"""The one place that states the version; pyproject.toml and setup.py read it from here."""

__version__ = "0.1.0"
