"""What is measured: a case and its tensors, and the grids of cases."""
