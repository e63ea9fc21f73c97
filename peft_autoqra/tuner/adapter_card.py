"""Our part of the README.md of an adapter's folder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

from peft_autoqra.card_pictures import FRONT_FILE, write_card_pictures
from peft_autoqra.markdown import inline_code, markdown_table
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.model_card import TAGS, memory_section, plan_section, search_section, versions_line
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.readme import HubMetadata, hub_id, update_readme
from peft_autoqra.units import format_seconds

_TITLE = "LoRA adapter on a quantized base"


@dataclass(frozen=True, kw_only=True)
class FineTuneFigures:
    """What a fine-tune measured.

    Attributes:
        held_out_loss: after training, as the trainer computes it.
        num_steps: optimizer steps that were taken.
        seconds: of the training loop.
        estimated: bytes by part as foretold; None where the optimizer's states are not known.
        measured: bytes of the real tensors at the first optimizer step; None where no step was taken.
    """

    held_out_loss: float
    num_steps: int
    seconds: float
    estimated: MemoryEstimate | None
    measured: MemoryEstimate | None


@dataclass(frozen=True, kw_only=True)
class AdapterCard:
    """What a model card says about an adapter.

    Attributes:
        plan: bits and rank of every module.
        base_model: hub id or folder.
        base_is_quantized: whether its files hold quantized weights.
        task_type: PEFT's name of the task, such as ``"CAUSAL_LM"``; None where the adapter has none.
        finetune: what the fine-tune measured; None where another trainer than ``autoqra train`` ran it.
    """

    plan: BitRankPlan
    base_model: str | None
    base_is_quantized: bool
    task_type: str | None
    finetune: FineTuneFigures | None = None

    def write(self, directory: Path) -> None:
        """Put the section and the metadata into the folder's README.md, and the pictures beside it.

        Args:
            directory: the adapter's.
        """
        metadata = HubMetadata(
            library_name="peft",
            tags=TAGS,
            base_model=hub_id(self.base_model),
            base_model_relation="adapter",
            pipeline_tag="text-generation" if self.task_type == "CAUSAL_LM" else None,
        )
        pictures = write_card_pictures(directory, self.plan, self.plan.memory, self.plan.provenance)
        update_readme(directory, _TITLE, self.section(pictures), metadata)

    def section(self, pictures: Collection[str]) -> str:
        """Markdown from the second level of headings on.

        Args:
            pictures: names of the files with pictures that lie beside the card.
        """
        memory = {"estimated": self.plan.memory}
        if self.finetune is not None:
            memory = {"estimated": self.finetune.estimated, "measured": self.finetune.measured}
        sections = [
            "## Weight bits and LoRA ranks (AutoQRA)",
            self._introduction(),
            "### How to load\n\n" + self._usage(),
            "### The plan\n\n" + markdown_table(("figure", "value"), self._figures()),
            plan_section(self.plan, pictures),
            "### Search\n\n" + search_section(self.plan.provenance) if FRONT_FILE in pictures else "",
            "### Memory\n\n" + memory_section(memory, pictures) if any(memory.values()) else "",
            versions_line("peft-autoqra", "peft", "transformers", "torch"),
        ]
        return "\n\n".join(section for section in sections if section)

    def _introduction(self) -> str:
        base = inline_code(self.base_model) if self.base_model else "its base model"
        if self.base_is_quantized:
            return (
                f"A LoRA adapter that was trained on {base}, whose weights are quantized layer by layer, by the plan "
                "below. It holds no base weights: the quantized base is downloaded when it is loaded.\n\n"
                "> **Import `peft_autoqra` before you load it. Without this package transformers loads the quantized "
                "layers of the base with RANDOM WEIGHTS**, and only warns."
            )
        return (
            f"A LoRA adapter that was trained on {base} with its weights quantized layer by layer, by the plan below. "
            "It holds no base weights: they are quantized again when it is loaded, to the same codes.\n\n"
            "> **Import `peft_autoqra` before you load it.** PEFT without this package reads it as plain LoRA and "
            "puts it on the *unquantized* base, which is not the model that was trained."
        )

    def _usage(self) -> str:
        peft_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(self.task_type or "")
        auto_class = f"Auto{peft_class.__name__}" if peft_class is not None else "AutoPeftModel"
        streamed = f"""

Where the 16-bit base does not fit into memory, quantize each weight as it is read:

```python
quantized = peft_autoqra.AutoQRAQuantConfig(plan=adapter)
model = {auto_class}.from_pretrained(adapter, quantization_config=quantized)
```"""
        return f"""```bash
pip install peft-autoqra
```

```python
import peft_autoqra  # first: it registers the method with PEFT
from peft import {auto_class}

adapter = "THIS_REPOSITORY_OR_FOLDER"
model = {auto_class}.from_pretrained(adapter)
```{"" if self.base_is_quantized else streamed}

For use without this package, merge it into an ordinary model (16 bits per weight):

```python
model.merge_and_unload().save_pretrained("merged")
```"""

    def _figures(self) -> list[tuple[str, str]]:
        rows = self.plan.to_card().figures()
        if self.finetune is not None:
            loss = f"{self.finetune.held_out_loss:.4f} after {self.finetune.num_steps} steps"
            seconds = format_seconds(self.finetune.seconds)
            rows.append(("held-out loss of this adapter", f"{loss} ({seconds} of training)"))
        return rows
