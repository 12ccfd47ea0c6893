"""Every backend as a function of an ``AttentionCall``, with tiles that tests of 136 tokens do not fill; kernels are interpreted."""

import functools

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh

from posjax.attention.backends import reference
from posjax.attention.backends.gpu import attention as gpu
from posjax.attention.backends.gpu.blocks import GpuBlocks
from posjax.attention.backends.ring import attention as ring
from posjax.attention.backends.ring.context import Context
from posjax.attention.backends.shards import ShardSpec
from posjax.attention.backends.tpu import attention as tpu
from posjax.attention.backends.tpu.blocks import Blocks
from posjax.attention.backends.xla_chunked import attention as xla_chunked


def around_a_ring(kernel, call):
    mesh = Mesh(np.array(jax.devices()[:2]), ("context",), axis_types=(AxisType.Auto,))
    return ring.attention(call, Context(ShardSpec(mesh), "context"), kernel=kernel)


def in_tpu_kernel(call):
    return tpu.attention(call, block_sizes=Blocks(128, 128, 128, 128), interpret=pltpu.InterpretParams())


def in_gpu_kernels(call):
    return gpu.attention(
        call,
        block_sizes=GpuBlocks(block_q=32, block_kv=32, block_kv_count=16, block_q_rows=16, num_warps=4, num_stages=2),
        interpret=True,
    )


BACKENDS = {
    "xla": reference.attention,
    "xla_chunked": functools.partial(xla_chunked.attention, tile=(40, 24)),
    "tpu": in_tpu_kernel,
    "gpu": in_gpu_kernels,
    "ring": functools.partial(around_a_ring, "xla"),
    "ring, tpu": functools.partial(around_a_ring, "tpu"),
    "ring, gpu": functools.partial(around_a_ring, "cuda"),
}
