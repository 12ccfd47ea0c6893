"""What is said where the compiler of a chip refuses the attention kernel after all."""

import contextlib
import re
from collections.abc import Iterator

import jax


class KernelRefused(RuntimeError):
    """The compiler of the chip refused the attention kernel; the message has its words, and says what runs without the kernel."""


@contextlib.contextmanager
def naming_refusals(implementation: str | None) -> Iterator[None]:
    """Raises KernelRefused in place of a compiler's error about the kernel, where ``implementation`` is one that may take it.

    ``tpu.refusal`` knows of most beforehand; a compiler of another version may still have less room or more bugs.
    """
    try:
        yield
    except Exception as error:  # jax may wrap what the compiler said
        told = next((e for e in (error, error.__cause__) if isinstance(e, jax.errors.JaxRuntimeError)), None)
        of_kernel = told is not None and re.search("posjax_attention|mosaic|triton|vmem", str(told), re.I)
        if not of_kernel or implementation not in (None, "pallas"):
            raise
        why = str(told).strip().split("\n")[0][:300]
        raise KernelRefused(
            f"implementation must be 'xla_chunked', got {implementation!r}, with which the compiler of the chip refuses "
            f"the attention kernel: {why}"
        ) from error
