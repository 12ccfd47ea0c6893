"""The configurations that posjax brings, a file each; ``posjax list`` shows them, and commands take their names."""
