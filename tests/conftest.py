"""Every test runs on the CPU, with eight devices that are really one, so that sharded code is tested on any machine."""

import os
import sys
from pathlib import Path

DEVICES = "--xla_force_host_platform_device_count=8"

# Before anything imports jax, which reads these once. Subprocesses of tests inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
