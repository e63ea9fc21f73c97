"""Ordinary checkpoints without quantized layers: with the adapter merged, or of the base that it was trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_autoqra.errors import ExportError, InvalidPlanError, PlanMismatchError
from peft_autoqra.export.export_folder import export_folder
from peft_autoqra.plan import locate_file
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.model import dequantize_base

_TOKENIZER_CONFIG = "tokenizer_config.json"


def export_merged_model(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    model_name_or_path: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an ordinary checkpoint of the base, dequantized, with the adapter merged into it.

    Args:
        adapter: folder or hub id of a saved adapter.
        output_dir: new, empty or an earlier export.
        model_name_or_path: of the base model, where it is not the one that the adapter names.
        dtype: of the weights that are written; the base checkpoint's by default. Weights are merged in the dtype of
            the base, then cast.

    Raises:
        ExportError: no AutoQRA adapter, the base cannot be loaded, or ``output_dir`` holds other files.
        PlanMismatchError: the base is not the one that the adapter was trained on.
    """
    with export_folder(output_dir, "merged") as folder:
        model, tokenizer = _load(str(adapter), model_name_or_path, dtype)
        _save(model.merge_and_unload(), tokenizer, dtype, folder)


def export_dequantized_base(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    model_name_or_path: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an ordinary checkpoint of the base that an adapter was trained on, dequantized, without the adapter.

    Arguments and errors are those of :func:`export_merged_model`.
    """
    with export_folder(output_dir, "base") as folder:
        model, tokenizer = _load(str(adapter), model_name_or_path, dtype)
        base = model.unload()
        dequantize_base(base)
        _save(base, tokenizer, dtype, folder)


def _load(
    adapter: str, model_name_or_path: str | None, dtype: torch.dtype | None
) -> tuple[PeftModel, PreTrainedTokenizerBase | None]:
    """The model as it was trained, and its tokenizer where there is one."""
    config = _adapter_config(adapter)
    base, revision = model_name_or_path, None
    if base is None:
        base, revision = config.base_model_name_or_path, config.revision
    if base is None:
        raise ExportError(f"The adapter in {adapter!r} does not name its base model; give model_name_or_path.")
    tokenizer = _load_tokenizer(adapter, None) or _load_tokenizer(base, revision)
    try:
        model = _load_base(base, revision, config.task_type, "auto", tokenizer)
        return PeftModel.from_pretrained(model, adapter), tokenizer
    except PlanMismatchError:
        if dtype is None:
            raise
    # Trained in another dtype than the checkpoint's: what was quantized are its weights cast to that.
    model = _load_base(base, revision, config.task_type, dtype, tokenizer)
    return PeftModel.from_pretrained(model, adapter), tokenizer


def _adapter_config(adapter: str) -> AutoQRAConfig:
    try:
        config = PeftConfig.from_pretrained(adapter)
    except InvalidPlanError:
        raise
    except ValueError as error:
        raise ExportError(f"{adapter!r} holds no adapter ({error}); give the folder of a saved one.") from error
    if not isinstance(config, AutoQRAConfig):
        raise ExportError(
            f"The adapter in {adapter!r} was not made by peft_autoqra, so it has no quantized base; load it with "
            "PEFT, and merge it with merge_and_unload()."
        )
    return config


def _load_tokenizer(place: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    if locate_file(_TOKENIZER_CONFIG, place, revision=revision) is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, revision=revision)
    except (OSError, ValueError) as error:
        raise ExportError(f"The tokenizer in {place!r} cannot be loaded: {_first_line(error)}") from error


def _load_base(
    base: str,
    revision: str | None,
    task_type: str | None,
    dtype: torch.dtype | str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedModel:
    auto_class = AutoModelForSeq2SeqLM if task_type == "SEQ_2_SEQ_LM" else AutoModelForCausalLM
    try:
        model = auto_class.from_pretrained(base, revision=revision, dtype=dtype)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ExportError(f"The base model {base!r} cannot be loaded: {_first_line(error)}") from error
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # tokens were added; PEFT's auto classes do the same
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype | None, folder: Path
) -> None:
    if dtype is not None:
        model.to(dtype)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
