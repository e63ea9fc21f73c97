"""The PEFT method: mixed-bit base weights with LoRA adapters of mixed ranks."""
