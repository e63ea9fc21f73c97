"""Searches on more and larger machines than there are, simulated."""
