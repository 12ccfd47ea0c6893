"""The configurations that posjax brings, a file each. ``posjax list`` shows them; commands take their names, or a file of your own."""
