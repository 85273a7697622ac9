"""The version, and the extension for the torch that is found; metadata is in pyproject.toml.

What it is compiled of, and the variables that change that, stand in setup_extension.py. A source
distribution is the same for every torch, and needs none. A build has torch's version in its own, as
0.1.0+torch2.13.0.cpu: it works with no other.
"""

from __future__ import annotations

import re
import site
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)


def package_version() -> str:
    """The version that batchnorm_ext/_version.py states, without importing the package."""
    text = (ROOT / "batchnorm_ext" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        sys.exit("batchnorm_ext: batchnorm_ext/_version.py has no line __version__ = ...")
    return match.group(1)


def show_environment() -> None:
    """Lets an isolated build of pip's see torch.

    pip hides the environment that it installs into, but runs its Python: its torch is the one to
    build for. It comes last, so that what the build asked for is taken from where pip put it.
    """
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # a virtual environment has none of its user's
        folders.append(site.getusersitepackages())
    sys.path += [folder for folder in folders if folder not in sys.path]


def check_torch() -> None:
    """One sentence where there is no torch to build for, or one that is too old."""
    needed = "torch {}.{} or newer".format(*MINIMUM_TORCH)
    try:
        import torch
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        sys.exit(
            f"batchnorm_ext: no torch to build for: install {needed}, then: pip install . "
            "(other tools than pip hide it: they have an option as --no-build-isolation)"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < MINIMUM_TORCH:
        sys.exit(f"batchnorm_ext: torch {torch.__version__} is too old, {needed} is needed")


def main() -> None:
    sys.path.insert(0, str(ROOT))  # a build by pip starts without it
    arguments: dict[str, Any] = {"version": package_version()}
    if not {"egg_info", "sdist"} & set(sys.argv):
        show_environment()
        check_torch()
        import setup_extension

        arguments = setup_extension.arguments(package_version())
    setup(**arguments)


if __name__ == "__main__":
    main()
