"""The README.md of a plan's folder or repository."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.units import format_bytes

TAGS = ("autoqra", "lora", "quantization")
_TITLE = "# AutoQRA plan for"
_PARTS = {
    "weight_bytes": "planned weights",
    "metadata_bytes": "quantization metadata",
    "untouched_bytes": "untouched modules",
    "adapter_bytes": "adapters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer states",
}


@dataclass(frozen=True, kw_only=True)
class PlanCard:
    """What a model card says about a plan.

    Attributes:
        base_model: hub id or folder of the model the plan is for.
        backend: of the quantizer.
        average_bits: mean bits per weight, without metadata.
        average_rank: mean rank over modules.
        bits_counts: bits to the number of modules that have them.
        memory: bytes by part.
        provenance: how the plan was found.
    """

    base_model: str | None
    backend: str
    average_bits: float
    average_rank: float
    bits_counts: Mapping[int, int]
    memory: MemoryEstimate | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def render(self) -> str:
        """The whole file, YAML header included."""
        sections = [self._header(), self._introduction(), self._figures(), self._memory(), self._usage()]
        return "\n\n".join(section for section in sections if section) + "\n"

    def _header(self) -> str:
        data: dict[str, Any] = {"library_name": "peft", "tags": list(TAGS)}
        if self._base_is_on_hub():
            data["base_model"] = self.base_model
        return f"---\n{yaml.safe_dump(data, sort_keys=False).strip()}\n---"

    def _base_is_on_hub(self) -> bool:
        """Folders are left out of the header: the hub accepts repository names only."""
        name = self.base_model or ""
        return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not Path(name).exists() and name[0] not in "./"

    def _introduction(self) -> str:
        base = f"`{self.base_model}`" if self.base_model else "a causal language model"
        return (
            f"{_TITLE} {base}\n\n"
            "Weight bits and LoRA rank of every planned layer, found by "
            "`peft-autoqra` for fine-tuning with PEFT within a memory budget. A plan holds no trained weights."
        )

    def _figures(self) -> str:
        spread = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(self.bits_counts.items()))
        rows = {
            "modules": spread,
            "average bits per weight, without metadata": f"{self.average_bits:.2f}",
            "average rank": f"{self.average_rank:.1f}",
            "quantizer": self.backend,
        }
        known = self.provenance
        if known.get("budget_bytes") is not None:
            rows["memory budget"] = f"{format_bytes(known['budget_bytes'])} ({known.get('budget_scope')})"
        if known.get("held_out_loss") is not None:
            rows["held-out loss in the search"] = f"{known['held_out_loss']:.4f} after {known.get('steps')} steps"
        if known.get("origin"):
            rows["found by"] = str(known["origin"])
        return _table(("figure", "value"), list(rows.items()))

    def _memory(self) -> str:
        if self.memory is None:
            return ""
        parts = self.memory.to_dict()
        rows = [(_PARTS[name], f"{parts[name]:,}") for name in _PARTS]
        rows += [("stored", f"{self.memory.stored_bytes:,}"), ("training", f"{self.memory.total_bytes:,}")]
        return "## Memory\n\nActivations are not counted.\n\n" + _table(("part", "bytes"), rows)

    def _usage(self) -> str:
        base = self.base_model or "BASE_MODEL"
        return f"""## Use

```bash
pip install peft-autoqra
```

```python
import peft_autoqra  # first: it registers the method with PEFT
from peft import get_peft_model
from transformers import AutoModelForCausalLM

plan = peft_autoqra.BitRankPlan.from_pretrained("THIS_REPOSITORY_OR_FOLDER")
base = AutoModelForCausalLM.from_pretrained("{base}")
model = get_peft_model(base, peft_autoqra.AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"))
```"""


def is_plan_card(text: str) -> bool:
    """Whether a README.md is a :class:`PlanCard`: it has our tag in its header and our title."""
    header, _, body = text.partition("\n---\n")
    return f"\n- {TAGS[0]}\n" in header and body.lstrip().startswith(_TITLE)


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])
