"""posjax list: lists the encodings and the configs."""

from pathlib import Path


def list_all() -> None:
    """Runs posjax list: prints the encodings and the configs."""
    from posjax.core.encoding import registered
    from posjax.encodings.spec import one_line

    print("encodings (join with +, alternate layers with /):")
    for name in registered():
        print(f"  {name:<12} {one_line(name)}")
    print("configs:")
    for path in sorted(Path("configs").glob("*.py")):
        first_line = path.read_text().lstrip('"').split("\n")[0]
        print(f"  {path!s:<28} {first_line}")
