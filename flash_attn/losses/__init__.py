"""Losses in one pass over the logits, or without them."""
