"""For the site's build: what the pages show that does not lie in docs/.

A page says `../benchmarks/results/x.png`, which is right where the repository is browsed. Here the
same files become part of the site, so that the links hold there too.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

#: Figures and result files, from the repository's root.
OUTSIDE = ("benchmarks/results/*.png", "benchmarks/results/*.json")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with the files of docs/."""
    root = Path(config.config_file_path).parent
    for path in sorted(path for pattern in OUTSIDE for path in root.glob(pattern)):
        uri = path.relative_to(root).as_posix()
        # Said aloud, because mkdocs leaves out what begins with a dot.
        file = File.generated(
            config, f"../{uri}", abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED
        )
        file.dest_uri = uri
        files.append(file)
    return files
