"""`iqa-run`: many images in; records, tables and files out."""
