"""Sphinx settings: Markdown pages by MyST, the API reference from the docstrings. Builds without a network."""

import selftrans_reg

project = "selftrans-reg"
author = "the selftrans-reg authors"
project_copyright = "the selftrans-reg authors, Apache-2.0"
release = version = selftrans_reg.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # formulas render without a network
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"selftrans-reg {release}"
html_static_path = ["_static"]
html_css_files = ["pictures.css"]

copybutton_exclude = ".linenos, .gp, .go"  # prompts and printed output of a session are not copied

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"  # what makes an object first, as in the code
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Shape", "params_style")]

# Names of other projects cannot be resolved without their inventories, which need a network: only ours are checked.
nitpick_ignore_regex = [(r"py:.*", r"(?!selftrans_reg\b).*")]
# Types that appear in signatures and are not public themselves.
nitpick_ignore = [
    ("py:class", f"selftrans_reg.{name}") for name in ("calls.Call", "settings.Common", "hub.Source", "hub.Details")
]
