"""Quantized weights: formats, fits, layers and their exact bytes."""

import logging

# bitsandbytes warns at import that it lacks a kernel for the repacked CPU layout, which NF4Linear never uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))
