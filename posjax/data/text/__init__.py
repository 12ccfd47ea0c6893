"""From files to documents: the choice of splits, formats, and bytes in pieces."""
