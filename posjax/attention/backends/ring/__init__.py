"""Attention around a ring of devices."""
