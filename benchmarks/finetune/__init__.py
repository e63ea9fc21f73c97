"""Fine-tunes side by side: every method by its own library, on the same data, within the same memory."""
