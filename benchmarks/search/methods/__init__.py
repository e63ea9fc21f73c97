"""Rivals, one per file; ``registry`` names them all."""
