"""What a plan is worth on real data."""
