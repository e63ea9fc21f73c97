"""Quantizing a model while its checkpoint is read, and reading and writing quantized checkpoints."""
