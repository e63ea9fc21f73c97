"""The bytes of a fine-tune, by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

MemoryScope = Literal["training", "stored"]


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a model takes, by part. Activations are not counted.

    Attributes:
        weight_bytes: the targeted weights: packed codes where quantized, dense where kept at 16 bits.
        metadata_bytes: scales, zero points and codebooks of the quantized weights.
        untouched_bytes: every other parameter and buffer of the base model (embeddings, norms, biases, heads).
        adapter_bytes: LoRA matrices in the dtype they are trained and saved in.
        gradient_bytes: gradients of the adapters.
        optimizer_bytes: optimizer states of the adapters.
    """

    weight_bytes: int
    metadata_bytes: int
    untouched_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def frozen_bytes(self) -> int:
        """All that is not trained: targeted weights, their metadata and the untouched modules."""
        return self.weight_bytes + self.metadata_bytes + self.untouched_bytes

    @property
    def stored_bytes(self) -> int:
        """Weights and adapters: what lies on disk and in memory when the model serves."""
        return self.frozen_bytes + self.adapter_bytes

    @property
    def total_bytes(self) -> int:
        """Weights, adapters, gradients and optimizer states: what fine-tuning holds beside activations."""
        return self.stored_bytes + self.gradient_bytes + self.optimizer_bytes

    def in_scope(self, scope: MemoryScope) -> int:
        """The bytes that a budget of this scope limits."""
        return self.total_bytes if scope == "training" else self.stored_bytes

    def to_dict(self) -> dict[str, int]:
        """The six parts as a JSON-ready mapping; ``MemoryEstimate(**d)`` reads it back."""
        return asdict(self)
