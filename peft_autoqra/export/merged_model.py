"""Ordinary checkpoints without quantized layers: with the adapter merged, or of the base that it was trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from peft_autoqra.errors import ExportError, InvalidPlanError, PlanMismatchError
from peft_autoqra.export.export_folder import export_folder
from peft_autoqra.hub_files import locate_file
from peft_autoqra.plan_file import ADAPTER_FILE
from peft_autoqra.tuner.config import AutoQRAConfig
from peft_autoqra.tuner.model import dequantize_base
from peft_autoqra.tuner.preparation import quantize_base

_TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


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
        source = _find(str(adapter), model_name_or_path)
        _save(_load(source, dtype, _merged), source, dtype, folder)


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
        source = _find(str(adapter), model_name_or_path)
        _save(_load(source, dtype, _dequantized), source, dtype, folder)


@dataclass(frozen=True)
class _Source:
    """Where everything is.

    Attributes:
        adapter: folder or hub id.
        base: folder or hub id.
        revision: of the base.
        task_type: of the adapter.
        tokenizer_files: of the adapter's folder, else of the base's.
    """

    adapter: str
    base: str
    revision: str | None
    task_type: str | None
    tokenizer_files: tuple[Path, ...]


def _find(adapter: str, model_name_or_path: str | None) -> _Source:
    config = _adapter_config(adapter)
    base, revision = model_name_or_path, None
    if base is None:
        base, revision = config.base_model_name_or_path, config.revision
    if base is None:
        raise ExportError(f"The adapter in {adapter!r} does not name its base model; give model_name_or_path.")
    files = _tokenizer_files(adapter, None) or _tokenizer_files(base, revision)
    return _Source(adapter, base, revision, config.task_type, files)


def _tokenizer_files(place: str, revision: str | None) -> tuple[Path, ...]:
    """Copied as they are: a tokenizer loaded and saved again may come out as another class with other files."""
    folder = Path(place)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(place, revision=revision, allow_patterns=list(_TOKENIZER_FILES)))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ExportError(
                f"{place!r} is neither a folder here nor reachable on the hub: {_first_line(error)}"
            ) from error
    return tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())


def _load(
    source: _Source, dtype: torch.dtype | None, finish: Callable[[PreTrainedModel, str], PreTrainedModel]
) -> PreTrainedModel:
    """The base model, with what the adapter makes of it."""
    try:
        return finish(_load_base(source, "auto"), source.adapter)
    except PlanMismatchError:
        if dtype is None:
            raise
    # Trained in another dtype than the checkpoint's: what was quantized are its weights cast to that.
    return finish(_load_base(source, dtype), source.adapter)


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


def _load_base(source: _Source, dtype: torch.dtype | str) -> PreTrainedModel:
    auto_class = AutoModelForSeq2SeqLM if source.task_type == "SEQ_2_SEQ_LM" else AutoModelForCausalLM
    try:
        return auto_class.from_pretrained(source.base, revision=source.revision, dtype=dtype)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ExportError(f"The base model {source.base!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dequantized(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Its layers quantized as in training, and made dense again."""
    quantize_base(model, _adapter_config(adapter))
    dequantize_base(model)
    return model


def _merged(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """With the adapter; embeddings are resized where it brings larger ones of its own."""
    num_tokens = _num_saved_embeddings(model, adapter)
    if num_tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(num_tokens)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _num_saved_embeddings(model: PreTrainedModel, adapter: str) -> int:
    """Rows of the embedding that an adapter brings; 0 where it brings none."""
    path = locate_file(ADAPTER_FILE, adapter)
    if path is None:
        raise ExportError(f"There is no {ADAPTER_FILE} in {adapter!r}; save the adapter again.")
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    try:
        with safe_open(path, framework="pt") as file:
            keys = {f"base_model.model.{name}{suffix}" for suffix in (".weight", ".base_layer.weight")} & {
                *file.keys()
            }
            return max((file.get_slice(key).get_shape()[0] for key in keys), default=0)
    except SafetensorError as error:
        raise ExportError(f"The adapter in {adapter!r} is damaged ({error}); save or download it again.") from error


def _save(model: PreTrainedModel, source: _Source, dtype: torch.dtype | None, folder: Path) -> None:
    if dtype is not None:
        model.to(dtype)
    model.save_pretrained(folder)
    for path in source.tokenizer_files:
        shutil.copyfile(path, folder / path.name)
