"""Ordinary checkpoints without quantized layers: with the adapter merged, or of the base that it was trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from peft_autoqra.beside_models import TOKENIZER_FILES
from peft_autoqra.errors import ExportError, InvalidPlanError, PlanMismatchError
from peft_autoqra.export.adapter_config import read_adapter_config
from peft_autoqra.export.export_folder import check_replaceable, export_folder
from peft_autoqra.hub_files import locate_file
from peft_autoqra.plan_file import ADAPTER_FILE
from peft_autoqra.tuner.model import dequantize_base
from peft_autoqra.tuner.preparation import quantize_base


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
        HubError: the adapter's repository does not exist, gives no access or cannot be reached.
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


@dataclass(frozen=True, kw_only=True)
class CheckpointForecast:
    """What writing a checkpoint will take.

    Attributes:
        base: folder or hub id of the base that will be loaded.
        dtype: of the weights that will be written.
        weight_bytes: of them; embeddings that the adapter enlarges are not counted.
        tokenizer_files: that will be copied.
    """

    base: str
    dtype: torch.dtype
    weight_bytes: int
    tokenizer_files: tuple[str, ...]


def forecast_checkpoint(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    model_name_or_path: str | None = None,
    dtype: torch.dtype | None = None,
) -> CheckpointForecast:
    """What :func:`export_merged_model` and :func:`export_dequantized_base` would write; no weight is loaded.

    Arguments are theirs.

    Raises:
        ExportError: no AutoQRA adapter, the base is not there, or ``output_dir`` holds other files.
        HubError: the adapter's repository does not exist, gives no access or cannot be reached.
    """
    check_replaceable(Path(output_dir).resolve())
    source = _find(str(adapter), model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(source.base, revision=source.revision)
        with torch.device("meta"):
            model = _auto_class(source).from_config(config)
    except (OSError, ValueError, ImportError) as error:
        raise ExportError(
            f"The configuration of the base model {source.base!r} cannot be loaded: {_first_line(error)}"
        ) from error
    written = dtype or config.dtype or torch.float32
    return CheckpointForecast(
        base=source.base,
        dtype=written,
        weight_bytes=sum(parameter.numel() for parameter in model.parameters()) * written.itemsize,
        tokenizer_files=tuple(source.tokenizer_files),
    )


@dataclass(frozen=True)
class _Source:
    """Where everything is.

    Attributes:
        adapter: folder or hub id.
        base: folder or hub id.
        revision: of the base.
        trained_on: the base that the adapter names.
        task_type: of the adapter.
        tokenizer_files: of the adapter's folder, else of the base's; name in there to path.
    """

    adapter: str
    base: str
    revision: str | None
    trained_on: str | None
    task_type: str | None
    tokenizer_files: Mapping[str, Path]


def _find(adapter: str, model_name_or_path: str | None) -> _Source:
    config = read_adapter_config(adapter)
    base, revision = model_name_or_path, None
    if base is None:
        base, revision = config.base_model_name_or_path, config.revision
    if base is None:
        raise ExportError(f"The adapter in {adapter!r} does not name its base model; give --model_name_or_path.")
    files = _tokenizer_files(adapter, None) or _tokenizer_files(base, revision)
    return _Source(adapter, base, revision, config.base_model_name_or_path, config.task_type, files)


def _tokenizer_files(place: str, revision: str | None) -> dict[str, Path]:
    """Copied as they are: a tokenizer loaded and saved again may come out as another class with other files."""
    folder = Path(place)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(place, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ExportError(
                f"{place!r} is neither a folder here nor reachable on the hub: {_first_line(error)}"
            ) from error
    paths = sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _load(
    source: _Source, dtype: torch.dtype | None, finish: Callable[[PreTrainedModel, str], PreTrainedModel]
) -> PreTrainedModel:
    """The base model, with what the adapter makes of it."""
    try:
        return _load_in(source, "auto", finish)
    except PlanMismatchError:
        if dtype is None:
            raise
    # Trained in another dtype than the checkpoint's: what was quantized are its weights cast to that.
    return _load_in(source, dtype, finish)


def _load_in(
    source: _Source, dtype: torch.dtype | str, finish: Callable[[PreTrainedModel, str], PreTrainedModel]
) -> PreTrainedModel:
    model = _load_base(source, dtype)
    try:
        return finish(model, source.adapter)
    except InvalidPlanError as error:
        if source.trained_on in (None, source.base):
            raise
        raise PlanMismatchError(
            f"{source.base!r} is not the base model that the adapter was trained on ({source.trained_on!r}), or not "
            f"in the dtype of the training (give --dtype): {error}"
        ) from error


def _load_base(source: _Source, dtype: torch.dtype | str) -> PreTrainedModel:
    try:
        return _auto_class(source).from_pretrained(source.base, revision=source.revision, dtype=dtype)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ExportError(f"The base model {source.base!r} cannot be loaded: {_first_line(error)}") from error


def _auto_class(source: _Source) -> Any:
    return AutoModelForSeq2SeqLM if source.task_type == "SEQ_2_SEQ_LM" else AutoModelForCausalLM


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dequantized(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Its layers quantized as in training, and made dense again."""
    quantize_base(model, read_adapter_config(adapter))
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
    for name, path in source.tokenizer_files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
