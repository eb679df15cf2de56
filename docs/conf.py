"""How Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_code")]

from example_data import quickstart_folder  # noqa: E402
from generate import packages_page, write_reference  # noqa: E402

from slim import __version__  # noqa: E402

project = "SLIM-Brain"
author = "SLIM-Brain contributors"
copyright = "SLIM-Brain contributors"
version = release = __version__

extensions = [
    "mathml",
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_code", "examples"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
default_role = "literal"
smartquotes = False  # `--list` is no dash
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's Parameters have the types
numpydoc_show_class_members = False
copybutton_exclude = ".linenos, .gp, .go"

templates_path = ["_templates"]
html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = "SLIM-Brain"
html_static_path = ["_static"]
html_css_files = ["slim.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "header_links_before_dropdown": 7,
    "footer_start": ["copyright"],
    "footer_end": [],
}

# Relative to the examples, whose folder is the working folder when they run: pages show no path of this machine.
os.environ["SLIM_QUICKSTART"] = os.path.relpath(quickstart_folder(), HERE / "examples")
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "tutorials/gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1e6,
    "show_signature": False,
    "abort_on_example_error": True,
    "matplotlib_animations": False,
}
suppress_warnings = ["config.cache"]
# Libraries warn about what the reader of an example need not know.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)

write_reference(HERE / "reference")
(HERE / "contributing" / "packages.txt").write_text(packages_page(), encoding="utf-8")
