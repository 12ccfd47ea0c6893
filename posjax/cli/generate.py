"""posjax generate: completes prompts with a trained model."""

import sys
from collections.abc import Sequence

from posjax.cli.common import given, parse


def generate(args: Sequence[str]) -> None:
    """Runs posjax generate: completes prompts with a trained model and streams the text to the terminal."""
    from posjax.attention.backends.compile_errors import translate_compile_errors
    from posjax.lab.prompting import Prompting, continue_prompts

    prompting, config = parse(args, "generate", Prompting)
    # A model may generate control sequences, which a terminal would execute.
    controls = {n: "\N{REPLACEMENT CHARACTER}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}

    def write(text: str) -> None:
        sys.stdout.write(text.translate(controls) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    try:
        with translate_compile_errors(config.implementation):
            continue_prompts(config, prompting, write, is_pretrained="from_pretrained" in given(args))
    except KeyboardInterrupt:
        write("\n")
        sys.exit(130)
