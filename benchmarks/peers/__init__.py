"""Who is measured: this package, PyTorch, other libraries and the machine's limits."""
