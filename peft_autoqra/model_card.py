"""What a model card says about a plan, and the README.md of a plan's folder."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from peft_autoqra.card_pictures import FRONT_FILE, MEMORY_FILE
from peft_autoqra.markdown import escaped, inline_code, markdown_table
from peft_autoqra.memory_estimate import MemoryEstimate
from peft_autoqra.memory_figure import MEMORY_PARTS
from peft_autoqra.objective_info import objective_from
from peft_autoqra.plan_grid import BitsAndRank
from peft_autoqra.plan_picture import PICTURE_FILE
from peft_autoqra.plan_points import points_from
from peft_autoqra.plan_table import plan_table
from peft_autoqra.readme import hub_id
from peft_autoqra.units import format_bytes, format_signed

TAGS = ("autoqra", "lora", "quantization")
_TITLE = "# AutoQRA plan for"


@dataclass(frozen=True, kw_only=True)
class PlanCard:
    """What a model card says about a plan.

    Attributes:
        layers: module name to bits and rank.
        base_model: hub id or folder of the model the plan is for.
        fingerprint: of the base model's weights.
        backend: of the quantizer.
        group_size: weights that share a scale.
        average_bits: mean bits, without metadata.
        average_is_per_weight: whether that mean is over weights; else it is over modules, of any size.
        average_rank: mean rank over modules.
        memory: bytes by part.
        provenance: how the plan was found.
    """

    layers: Mapping[str, BitsAndRank]
    base_model: str | None
    fingerprint: str | None
    backend: str
    group_size: int
    average_bits: float
    average_is_per_weight: bool
    average_rank: float
    memory: MemoryEstimate | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def render(self, pictures: Collection[str]) -> str:
        """The whole file, YAML header included.

        Args:
            pictures: names of the files with pictures that lie beside it.
        """
        sections = [
            self._header(),
            self._introduction(),
            markdown_table(("figure", "value"), self.figures()),
            "## Plan\n\n" + plan_section(self.layers, pictures),
            "## Search\n\n" + search_section(self.provenance) if FRONT_FILE in pictures else "",
            "## Memory\n\n" + memory_section({"estimated": self.memory}, pictures) if self.memory else "",
            self._usage(),
            versions_line("peft-autoqra"),
        ]
        return "\n\n".join(section for section in sections if section) + "\n"

    def figures(self) -> list[tuple[str, str]]:
        """Rows of a table: the plan in numbers, its base and how it was found."""
        counts = Counter(layer.bits for layer in self.layers.values())
        grouped = "" if self.backend == "bitsandbytes" else f", groups of up to {self.group_size} weights"
        averaged = "weight" if self.average_is_per_weight else "module"
        rows = {
            "modules": ", ".join(f"{count} at {bits} bits" for bits, count in sorted(counts.items())),
            f"average bits per {averaged}, without metadata": f"{self.average_bits:.2f}",
            **({"average rank": f"{self.average_rank:.1f}"} if self.average_rank else {}),
            "quantizer": self.backend + grouped,
        }
        known = self.provenance
        if _is_number(known.get("budget_bytes")):
            rows["memory budget"] = f"{format_bytes(known['budget_bytes'])} ({known.get('budget_scope')})"
        if _is_number(known.get("held_out_loss")):
            rows["held-out loss in the search"] = f"{known['held_out_loss']:.4f} after {known.get('steps')} steps"
        if _is_number(known.get("objective_value")):
            rows["chosen for"] = f"{objective_from(known).title}: {known['objective_value']:.4f}"
        if known.get("origin"):
            rows["found by"] = str(known["origin"])
        if self.fingerprint:
            rows["base weights"] = (
                f"fingerprint {self.fingerprint} before quantization; it is checked, since other weights would give "
                "other codes"
            )
        return list(rows.items())

    def _header(self) -> str:
        data: dict[str, Any] = {"library_name": "peft", "tags": list(TAGS)}
        if base_model := hub_id(self.base_model):
            data["base_model"] = base_model
        return f"---\n{yaml.safe_dump(data, sort_keys=False).strip()}\n---"

    def _introduction(self) -> str:
        base = inline_code(self.base_model) if self.base_model else "a causal language model"
        searched = _is_number(self.provenance.get("budget_bytes"))
        found = ", found by `peft-autoqra` within a memory budget" if searched else ""
        return (
            f"{_TITLE} {base}\n\n"
            f"Weight bits and LoRA rank of every planned layer{found}, for fine-tuning with PEFT. A plan holds no "
            "trained weights."
        )

    def _usage(self) -> str:
        base = json.dumps(self.base_model or "BASE_MODEL", ensure_ascii=False)
        return f"""## Use

```bash
pip install peft-autoqra
```

```python
import peft_autoqra  # first: it registers the method with PEFT
from peft import get_peft_model
from transformers import AutoModelForCausalLM

plan = peft_autoqra.BitRankPlan.from_pretrained("THIS_REPOSITORY_OR_FOLDER")
base = AutoModelForCausalLM.from_pretrained({base})
model = get_peft_model(base, peft_autoqra.AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"))
```"""


def _is_number(value: object) -> bool:
    """Provenance is JSON of any kind."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_plan_card(text: str) -> bool:
    """Whether a README.md is a :class:`PlanCard`: it has our tag in its header and our title."""
    header, _, body = text.partition("\n---\n")
    return f"\n- {TAGS[0]}\n" in header and body.lstrip().startswith(_TITLE)


def plan_section(layers: Mapping[str, BitsAndRank], pictures: Collection[str]) -> str:
    """The plan as a picture and as a table.

    Args:
        layers: module name to bits and rank.
        pictures: names of the files with pictures that lie beside the card.
    """
    has_ranks = any(layer.rank for layer in layers.values())
    meaning = "Colour is bits, the area of a dot is rank." if has_ranks else "Colour is bits."
    picture = f"![Layers down, module types across. {meaning} The table below says the same.]({PICTURE_FILE})"
    return "\n\n".join([*([picture] if PICTURE_FILE in pictures else []), plan_table(layers)])


def search_section(provenance: Mapping[str, Any]) -> str:
    """The Pareto front of the search as a picture, which lies beside the card, and as a table."""
    objective = objective_from(provenance)
    points = sorted(points_from(provenance), key=lambda point: point.total_bytes)
    rows = [
        (
            point.name or f"{point.stage.replace('_', ' ')}, on the front",
            format_bytes(point.total_bytes),
            format_signed(objective.figure(point.difference)),
            " to ".join(map(format_signed, objective.interval(*point.interval)))
            if math.isfinite(point.interval[0])
            else "",
        )
        for point in points
    ]
    picture = (
        f"![{escaped(objective.heading)} against memory: the Pareto front of the search and the plans that need no "
        f"search. The table below says the same.]({FRONT_FILE})"
    )
    better = "higher" if objective.greater_is_better else "lower"
    note = (
        f"The {escaped(objective.title)}, {better} is better: on the held-out sequences and training seeds that both "
        "had; the plan was chosen on them."
    )
    return "\n\n".join(
        [
            picture,
            note,
            markdown_table(("plan", "memory", f"{objective.short_name} minus the winner's", "95% interval"), rows),
        ]
    )


def memory_section(columns: Mapping[str, MemoryEstimate | None], pictures: Collection[str] = ()) -> str:
    """Bytes by part.

    Args:
        columns: title to bytes; those that are None are left out.
        pictures: names of the files with pictures that lie beside the card.
    """
    known = {title: memory for title, memory in columns.items() if memory is not None}
    rows = [
        (title, *(f"{getattr(memory, part):,}" for memory in known.values())) for part, title in MEMORY_PARTS.items()
    ]
    rows.append(("stored", *(f"{memory.stored_bytes:,}" for memory in known.values())))
    rows.append(("training", *(f"{memory.total_bytes:,}" for memory in known.values())))
    table = "Activations are not counted.\n\n" + markdown_table(("bytes", *known), rows)
    picture = f"![Bytes by part, as the table below says, against the budget.]({MEMORY_FILE})\n\n"
    return (picture if MEMORY_FILE in pictures else "") + table


def versions_line(*distributions: str) -> str:
    """What the files were written with; a package that runs from its sources has no version."""
    return f"Written with {', '.join(_with_version(name) for name in distributions)}."


def _with_version(distribution: str) -> str:
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution
