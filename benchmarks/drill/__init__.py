"""The reliability drill: real processes that are killed, starved, damaged and disturbed."""
