"""What was trained, in formats that tools without this package read."""
