"""Models of the attention and modules of this package, and conversion of their weights."""
