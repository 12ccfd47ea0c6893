"""The configurations of posjax, one per file; ``posjax list`` shows them, and commands accept their names."""
