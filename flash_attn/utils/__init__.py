"""Helpers for benchmarks and tests."""
