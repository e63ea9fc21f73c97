"""The model card of a folder that is about to be shared."""

from __future__ import annotations

from pathlib import Path

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.folder_contents import ADAPTER_CONFIG, base_files, read_adapter_config, read_json
from peft_autoqra.plan import BitRankPlan
from peft_autoqra.plan_file import ADAPTER_FILE, PLAN_FILE, read_header
from peft_autoqra.readme import has_section
from peft_autoqra.streaming.base_card import QuantizedBaseCard
from peft_autoqra.tuner.config import AutoQRAConfig


def complete_model_card(directory: str | Path) -> None:
    """Put the plan, as a table and a picture, and how to load it into the README.md of a saved model.

    Call it on the folder of a quantized base after ``base.save_pretrained``, where transformers writes no card. Plans
    and adapters have theirs once they are saved; a trainer's ``push_to_hub`` writes a card of its own over an
    adapter's, which this completes. What others wrote into the file stays.

    Args:
        directory: of a quantized base, an adapter or a plan.

    Raises:
        InvalidPlanError: the folder holds none of them, or a damaged one.
    """
    folder = Path(directory)
    if has_section(folder) and _adapter_config(folder) is not None:  # with what a fine-tune measured
        return
    if not write_model_card(folder) and not (folder / PLAN_FILE).is_file():
        raise InvalidPlanError(
            f"{str(folder)!r} holds no adapter, quantized base or plan of AutoQRA; give the folder that "
            "save_pretrained wrote."
        )


def write_model_card(folder: Path) -> bool:
    """Write our part of the card of an adapter or quantized base; returns whether the folder holds one.

    Raises:
        InvalidPlanError: it holds a damaged one.
    """
    config = _adapter_config(folder)
    if config is not None:
        adapter = folder / ADAPTER_FILE  # a plan beside it may be another one
        config.plan = BitRankPlan.from_metadata(read_header(adapter), str(adapter))
        config.card().write(folder)
        return True
    weights = [name for name in base_files(folder) if name.endswith(".safetensors")]
    if weights:
        QuantizedBaseCard.from_folder(folder, weights).write(folder)
    return bool(weights)


def _adapter_config(folder: Path) -> AutoQRAConfig | None:
    """None without an adapter, and for those of others, of whatever type."""
    path = folder / ADAPTER_CONFIG
    return read_adapter_config(folder) if path.is_file() and "autoqra_version" in read_json(path) else None
