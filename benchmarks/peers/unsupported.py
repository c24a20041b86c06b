"""What a peer raises instead of measuring something else."""


class Unsupported(Exception):
    """The peer cannot run the case, or is not installed; the text says why, in half a line."""
