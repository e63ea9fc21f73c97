"""What is compared, one idea per file."""
