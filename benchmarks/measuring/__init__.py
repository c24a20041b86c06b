"""How it is measured: turns, times, errors, and the table of results."""
