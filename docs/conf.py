"""Configuration of the site: ``sphinx-build -W docs docs/_build``."""

import importlib.metadata

project, author = "posjax", "The posjax authors"
release = importlib.metadata.version("posjax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "sphinx_book_theme"
html_title = "posjax"
html_static_path = ["_static"]
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2, "use_download_button": False}

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
