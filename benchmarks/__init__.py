"""Benchmarks that are programs of their own; not part of the wheel."""
