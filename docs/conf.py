"""Configuration of the site: ``sphinx-build -W docs docs/_build/html``.

The site makes no request to other hosts: equations are MathML, and fonts and scripts are the theme's own files. _ext/pages.py
generates the gallery and the reference from the code.
"""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project, author = "posjax", "The posjax authors"
release = importlib.metadata.version("posjax")

extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design", "mathml", "pages"]
exclude_patterns = ["_build", "jupyter_execute", "_ext"]

html_theme = "sphinx_book_theme"
html_title = "posjax"
html_static_path = ["_static"]
html_js_files = ["summaries.js"]
html_context = {"default_mode": "auto"}  # without one, the theme logs an error on every page
html_css_files = ["site.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_source_button": False,
}

smartquotes_action = "qe"  # flags keep their two hyphens
myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 4
myst_update_mathjax = False
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True

copybutton_prompt_text = ">>> |\\.\\.\\. |\\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True
copybutton_exclude = ".linenos, .gp, .go"
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
