"""The private parts of jax that posjax uses, where jax has no public name. All of them are here, and each has a test."""

import os
from typing import Any

import jax


def detect_cluster() -> Any:
    """Returns the cluster environment that ``jax.distributed.initialize`` would query for the processes of a run, or None."""
    from jax._src import clusters

    left_out: list[Any] = []
    if "JOB_COMPLETION_INDEX" not in os.environ:  # only indexed jobs have several processes; querying other pods fails
        left_out += [clusters.K8sCluster]
    if jax.config.jax_platforms == "cpu":  # a test run on one machine of a pod
        left_out += [clusters.GkeTpuCluster, clusters.GceTpuCluster]
    kinds = (kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method and kind not in left_out)
    return next((kind for kind in kinds if kind.is_env_present()), None)


def coordinator_client() -> Any:
    """Returns the client of the coordinator, its key-value store and barriers, which need no device; None before initialization."""
    from jax._src import distributed

    return distributed.global_state.client
