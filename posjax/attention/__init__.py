"""Attention under a positional encoding: one entry, its backends, the key-value cache and linear attention.

``posjax.attention`` is the function, and hides this package from the dotted forms ``posjax.attention.kv_cache`` and
``import posjax.attention.kv_cache as kv_cache``. So the function has the package's modules as attributes.
"""

from posjax.attention import api, arguments, backends, call, dispatch, kv_cache, linear, prefix_sums

for _module in (api, arguments, backends, call, dispatch, kv_cache, linear, prefix_sums):
    setattr(api.attention, _module.__name__.rpartition(".")[2], _module)
