"""Attention under a positional encoding: the entry point, its backends, the key-value cache and linear attention.

``posjax.attention`` is the function, which shadows this package in ``posjax.attention.kv_cache`` and
``import posjax.attention.kv_cache as kv_cache``. The function therefore has the package's modules as attributes.
"""

from posjax.attention import api, arguments, backends, call, dispatch, flax_modules, kv_cache, linear, prefix_sums

for _module in (api, arguments, backends, call, dispatch, flax_modules, kv_cache, linear, prefix_sums):
    setattr(api.attention, _module.__name__.rpartition(".")[2], _module)
