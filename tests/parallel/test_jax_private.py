"""The private parts of jax are where posjax looks for them, and nothing else of posjax uses any."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

import posjax
from posjax.parallel.jax_private import coordinator_client, detect_cluster

CLUSTERS = ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "PMIX_VERSION", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}


def test_no_other_module_uses_private_parts():
    uses = [path for path in Path(posjax.__file__).parent.rglob("*.py") if re.search(r"jax\._src", path.read_text())]
    assert [path.name for path in uses] == ["jax_private.py"]


@pytest.fixture
def no_cluster(monkeypatch):
    for name in (*CLUSTERS, *SLURM):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_cluster_is_detected(no_cluster):
    assert detect_cluster() is None
    for name, value in SLURM.items():
        no_cluster.setenv(name, value)
    cluster = detect_cluster()
    assert cluster.get_process_count() == 2 and cluster.get_process_id() == 1


def test_a_pod_is_no_cluster_unless_its_job_is_indexed(no_cluster):
    """Nothing is asked of a pod's API."""
    no_cluster.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detect_cluster() is None


def test_the_client_of_the_coordinator():
    assert not jax.distributed.is_initialized() and coordinator_client() is None
    code = """
import socket
import jax
from posjax.parallel.jax_private import coordinator_client
with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
jax.distributed.initialize(address, 1, 0)
client = coordinator_client()
client.key_value_set("name", "value")
assert client.blocking_key_value_get("name", 1000) == "value"
client.wait_at_barrier("here", 1000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
