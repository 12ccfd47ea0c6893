"""Grids of runs: what is swept, runs of the same shapes as one program, and rows of results."""
