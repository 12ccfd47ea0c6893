"""Meshes of devices, where arrays live on them, and several processes of one run."""
