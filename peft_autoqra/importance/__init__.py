"""Importance of bits and ranks per group, and the allocations that follow from it."""
