"""The error for an attention kernel that the device's compiler rejects."""

import contextlib
import re
from collections.abc import Iterator

import jax


class KernelCompileError(RuntimeError):
    """Raised when the device's compiler rejects the attention kernel. The message quotes the compiler and names an alternative."""


@contextlib.contextmanager
def translate_compile_errors(implementation: str | None) -> Iterator[None]:
    """Translates compiler errors about the attention kernel into KernelCompileError.

    ``tpu.unsupported_reason`` detects most unsupported calls before compilation. A compiler of another version may still have less
    memory available or more bugs.

    Args:
      implementation: the implementation of attention that the enclosed code uses. Errors are translated only for None and
        "pallas", which may run the kernel.

    Raises:
      KernelCompileError: in place of a JaxRuntimeError that mentions the kernel. All other errors pass through unchanged.
    """
    try:
        yield
    except Exception as error:  # JAX may wrap the compiler's error
        compile_error = next((e for e in (error, error.__cause__) if isinstance(e, jax.errors.JaxRuntimeError)), None)
        mentions_kernel = compile_error is not None and re.search("posjax_attention|mosaic|triton|vmem", str(compile_error), re.I)
        if not mentions_kernel or implementation not in (None, "pallas"):
            raise
        first_line = str(compile_error).strip().split("\n")[0][:300]
        raise KernelCompileError(
            f"the attention kernel failed to compile on this device with implementation={implementation!r}; "
            f"rerun with implementation='xla_chunked'. Compiler error: {first_line}"
        ) from error
