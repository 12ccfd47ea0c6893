"""Array annotations: jaxtyping's if it is installed, plain arrays if only jax and flax are.

Letters in shapes: B batch, T queries, S keys, N query heads, K key heads, H head dimension, D model dimension,
P positions, V vocabulary, L layers.
"""

from typing import Any

from jax import Array

try:
    from jaxtyping import Bool, Float, Int
except ImportError:  # annotations then give no shapes

    class _Plain:
        def __class_getitem__(cls, item: Any) -> Any:
            return item[0] if isinstance(item, tuple) else item

    Bool = Float = Int = _Plain

Params = Any  # a nested dict of learned arrays
__all__ = ["Array", "Bool", "Float", "Int", "Params"]
