"""Our part of the README.md of a quantized base's folder."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_autoqra.card_pictures import write_card_pictures
from peft_autoqra.markdown import inline_code, markdown_table
from peft_autoqra.model_card import plan_section, versions_line
from peft_autoqra.plan import DENSE_BITS, BaseModelInfo, BitRankPlan, LayerPlan, QuantizerSettings
from peft_autoqra.quant.backends import make_backend
from peft_autoqra.readme import HubMetadata, hub_id, update_readme
from peft_autoqra.streaming.quant_config import AutoQRAQuantConfig
from peft_autoqra.units import format_bytes

BASE_TAGS = ("autoqra", "quantization")
BASE_MODEL_KEY = "autoqra_base_model"
"""In the header of the weights' file: hub id of the model that was quantized."""

_DENSE_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class QuantizedBaseCard:
    """What a model card says about a quantized base.

    Attributes:
        plan: bits of every module; ranks are 0.
        architecture: name of the model's class.
        file_bytes: of the weights' files.
    """

    plan: BitRankPlan
    architecture: str
    file_bytes: int

    @classmethod
    def from_folder(cls, directory: Path, weight_files: Sequence[str]) -> QuantizedBaseCard:
        """Read what ``save_pretrained`` wrote.

        Args:
            directory: of a base that AutoQRA quantized.
            weight_files: names of the files with its tensors.

        Raises:
            InvalidPlanError: the quantization configuration is damaged or of a newer format.
        """
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        architecture = (config.get("architectures") or [None])[0]
        files = [directory / name for name in weight_files]
        return cls(
            plan=_plan(AutoQRAQuantConfig.from_dict(config["quantization_config"]), _base_model(files[0])),
            architecture=architecture if str(architecture).isidentifier() else "AutoModel",
            file_bytes=sum(file.stat().st_size for file in files),
        )

    def write(self, directory: Path) -> None:
        """Put the section and the metadata into the folder's README.md, and the picture beside it.

        Args:
            directory: the quantized base's.
        """
        base_model = self.plan.base_model.name_or_path
        metadata = HubMetadata(
            library_name="transformers",
            tags=BASE_TAGS,
            base_model=base_model,
            base_model_relation="quantized",
            pipeline_tag="text-generation" if self._is_causal else None,
        )
        title = f"{base_model.rpartition('/')[2]}, quantized" if base_model else "Quantized model"
        pictures = write_card_pictures(directory, self.plan)
        update_readme(directory, title, self.section(pictures), metadata)

    def section(self, pictures: Collection[str]) -> str:
        """Markdown from the second level of headings on.

        Args:
            pictures: names of the files with pictures that lie beside the card.
        """
        sections = [
            "## Quantized layer by layer (AutoQRA)",
            self._introduction(),
            "### How to load\n\n" + self._usage(),
            "### Bits of every layer\n\n" + markdown_table(("figure", "value"), self._figures()),
            plan_section(self.plan, pictures),
            versions_line("peft-autoqra", "transformers", "torch"),
        ]
        return "\n\n".join(sections)

    @property
    def _is_causal(self) -> bool:
        return self.architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _introduction(self) -> str:
        base_model = self.plan.base_model.name_or_path
        base = inline_code(base_model) if base_model else "The base model"
        return (
            f"{base} with the weights of its linear layers at the bits below; LoRA adapters can be trained on it.\n\n"
            "> **Import `peft_autoqra` before you load it. Without this package transformers loads the quantized "
            "layers with RANDOM WEIGHTS**, and only warns."
        )

    def _usage(self) -> str:
        model_class = "AutoModelForCausalLM" if self._is_causal else self.architecture
        return f"""```bash
pip install peft-autoqra
```

```python
import peft_autoqra  # first: it registers the format with transformers
from transformers import {model_class}

model = {model_class}.from_pretrained("THIS_REPOSITORY_OR_FOLDER")
```"""

    def _figures(self) -> list[tuple[str, str]]:
        backend = make_backend(self.plan.quantizer)
        shapes = self.plan.shapes
        dense = {name: math.prod(shape) * _DENSE_BYTES for name, shape in shapes.items()}
        quantized = sum(
            sum(backend.num_bytes(*shapes[name], layer.bits, name)) if layer.bits != DENSE_BITS else dense[name]
            for name, layer in self.plan.items()
        )
        others = self.file_bytes - quantized
        dense_bytes = sum(dense.values())
        return [
            *self.plan.to_card().figures(),
            ("these layers", f"{format_bytes(quantized)}; at 16 bits {format_bytes(dense_bytes)}"),
            ("all else", format_bytes(others)),
            (
                "whole model",
                f"{format_bytes(self.file_bytes)}; with these layers at 16 bits {format_bytes(dense_bytes + others)}",
            ),
        ]


def base_metadata(model: Any) -> dict[str, str]:
    """For the header of the weights' file: config.json forgets which model was quantized.

    Args:
        model: that is about to be saved.
    """
    base_model = hub_id(model.config._name_or_path)
    return {BASE_MODEL_KEY: base_model} if base_model else {}


def _base_model(file_with_tensors: Path) -> str | None:
    with safe_open(file_with_tensors, framework="np") as file:
        return hub_id((file.metadata() or {}).get(BASE_MODEL_KEY))


def _plan(config: AutoQRAQuantConfig, base_model: str | None) -> BitRankPlan:
    return BitRankPlan(
        {name: LayerPlan(module.bits, 0) for name, module in config.modules.items()},
        shapes={name: module.shape for name, module in config.modules.items()},
        quantizer=QuantizerSettings(backend=config.quant_backend, group_size=config.group_size),
        base_model=BaseModelInfo(name_or_path=base_model, fingerprint=config.base_fingerprint),
    )
