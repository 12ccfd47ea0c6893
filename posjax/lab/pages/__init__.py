"""The content of pages of HTML: what models do with a text, and the results of runs. ``posjax.plots.explorer`` writes the pages."""
