"""Adapters of tiny models, exported once, and what a process without this package computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_autoqra.export.merged_model import export_dequantized_base, export_merged_model
from peft_autoqra.export.plain_lora import export_plain_lora
from tests.conftest import TinyLlamaFactory
from tests.export.models import Trained, tiny_qwen2, train
from tests.export.without_this_package import logits_elsewhere

MODELS = ("llama-tied", "llama", "qwen2", "bfloat16", "bitsandbytes")


@dataclass(frozen=True)
class Exported:
    """An adapter, the folders that it was exported to, and their logits in another process."""

    trained: Trained
    lora: Path
    merged: Path
    base: Path
    lora_logits: Tensor
    merged_logits: Tensor


@pytest.fixture(scope="session")
def all_exports(tmp_path_factory, tiny_llama: TinyLlamaFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("exports")
    adapters = {
        "llama-tied": train(tiny_llama(), folder / "llama-tied", lora_alpha=1),
        "llama": train(tiny_llama(tie_word_embeddings=False), folder / "llama", lora_alpha=1),
        "qwen2": train(tiny_qwen2(), folder / "qwen2", lora_alpha=1),
        "bfloat16": train(tiny_llama(), folder / "bfloat16", torch.bfloat16),
        "bitsandbytes": train(
            tiny_llama(),
            folder / "bitsandbytes",
            bits=4,
            r=2,
            rank_pattern={"v_proj": 3},
            quant_backend="bitsandbytes",
        ),
    }
    pairs: list[tuple[Path, Path | None]] = []
    for name, trained in adapters.items():
        lora, merged, base = (folder / name / export for export in ("lora", "merged", "dequantized"))
        export_plain_lora(trained.adapter, lora)
        export_merged_model(trained.adapter, merged)
        export_dequantized_base(trained.adapter, base)
        pairs += [(base, lora), (merged, None)]
    seen = iter(logits_elsewhere(pairs, folder))
    return {
        name: Exported(
            trained, *(folder / name / e for e in ("lora", "merged", "dequantized")), next(seen), next(seen)
        )
        for name, trained in adapters.items()
    }


@pytest.fixture(params=MODELS)
def exported(request: pytest.FixtureRequest, all_exports: dict[str, Exported]) -> Exported:
    return all_exports[request.param]
