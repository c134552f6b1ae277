"""A page to look at bits by measured sensitivity: its contents, and the one file of HTML."""
