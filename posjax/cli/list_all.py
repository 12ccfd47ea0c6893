"""posjax list: lists the encodings and the configs."""


def list_all() -> None:
    """Runs posjax list: prints the encodings and the configs."""
    from posjax.core.encoding import registered
    from posjax.encodings.spec import one_line
    from posjax.lab import named_configs

    print("encodings (join with +, alternate layers with /):")
    for name in registered():
        print(f"  {name:<12} {one_line(name)}")
    print("configs (or a Python file of your own):")
    for name, path in named_configs().items():
        first = path.read_text().lstrip('"').split("\n")[0]
        print(f"  {name:<16} {first}")
