"""Sphinx settings: Markdown pages by MyST, the API reference from the docstrings. Builds without a network."""

import inspect
import re
import sys
from typing import get_type_hints

from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

import selftrans_reg
from selftrans_reg.settings import Common

project = "selftrans-reg"
author = "the selftrans-reg authors"
project_copyright = "the selftrans-reg authors, Apache-2.0"
release = version = selftrans_reg.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # formulas render without a network
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"selftrans-reg {release}"
html_static_path = ["_static"]
html_css_files = ["pictures.css"]

copybutton_exclude = ".linenos, .gp, .go"  # prompts and printed output of a session are not copied

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# What the page of a class lists, where that is not all that is public; and whose constructor is not for users.
autosummary_context = {
    "made_by_functions": ("CFGFeatureTeacher", "SelfTransLoss"),
    "listed": {
        "CFGFeatureTeacher": "forward, pair, guide, refresh, from_pretrained, save_pretrained, push_to_hub",
        "ProjectionHead": "forward",
        "SelfTransLoss": "stage1, stage2, forward, measures, stopped_at, teacher, attach, detach, discard, "
        "release_teacher, check_optimizer, allow_changes",
        "VAEAlignmentLoss": "forward, predict",
    },
}
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
    ("py:class", f"selftrans_reg.{name}")
    for name in ("calls.Call", "settings.Common", "hub.Source", "hub.Details", "hub.Shareable")
]


def show_types(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Show the types of settings that are passed on as ``**settings: Unpack[...]``, where a docstring names them."""
    if name == "selftrans_reg.SelfTransLoss":  # in a list, with their defaults
        keys, found = Common, [n for n, line in enumerate(lines) if line.startswith("- ``")]
    elif inspect.isroutine(obj) and (passed := re.search(r"Unpack\[(\w+)\]", str(inspect.signature(obj)))):
        keys = getattr(sys.modules[obj.__module__], passed[1])
        found = range(
            next((n for n, line in enumerate(lines) if line.strip().startswith("**")), len(lines)), len(lines)
        )
    else:
        return
    types = {key: stringify_annotation(hint) for key, hint in get_type_hints(keys).items()}
    types = {key: re.sub(r"[\w.]+\.(?=\w)", "", text) for key, text in types.items()}  # by their last names
    for n in found:
        named = r"``(\w+)(=[^`]+)``" if keys is Common else r"``(\w+)()``"
        lines[n] = re.sub(
            named, lambda m: f"``{m[1]}: {types[m[1]]}{m[2].replace('=', ' = ')}``" if m[1] in types else m[0], lines[n]
        )


def setup(app: Sphinx) -> None:
    """Types first, then napoleon, which takes the sections apart."""
    app.connect("autodoc-process-docstring", show_types, priority=400)
