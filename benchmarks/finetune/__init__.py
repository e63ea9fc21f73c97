"""Fine-tunes side by side: every method by its own library, on the same data, at the same memory."""
