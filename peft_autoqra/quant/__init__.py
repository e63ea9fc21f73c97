"""Quantized weights: formats, fits, layers and their exact bytes."""
