"""Rotary encodings from other people's configurations: Hugging Face's config.json, as transformers 4 and 5 write it.

    4.x   "rope_theta": 500000.0, "rope_scaling": null or {"rope_type" or "type": "yarn", "factor": 4.0, ...}
    5.x   "rope_parameters": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0, ...}
          "rope_parameters": {"full_attention": {...}, "sliding_attention": {...} or null}

Values that a configuration leaves out are defaults of its model type, and so are the pairing of channels and the layers that do not
rotate. ``defaults`` holds them.
"""

from posjax.encodings.rope_config.encoding import rope_from_config

__all__ = ["rope_from_config"]
