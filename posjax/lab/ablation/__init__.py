"""Grids of runs: sweeps over settings, runs of equal shapes compiled as one program, and rows of results."""
