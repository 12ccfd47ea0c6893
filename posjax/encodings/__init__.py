"""The encodings, one module per family. All of them are in the registry, ``posjax.core.encoding.registered()``."""

from posjax.encodings import absolute, cope, relative, rotary, tupe

__all__ = ["absolute", "cope", "relative", "rotary", "tupe"]
