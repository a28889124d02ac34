"""The site of `docs/`, built by Sphinx: `make docs`. A link that leads nowhere is an error."""

from arriero.version import __version__

project = "Arriero"
author = copyright = "The Arriero authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
myst_heading_anchors = 3  # headings that links may name
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header"]
