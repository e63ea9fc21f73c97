"""``autoqra export``."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_autoqra.commands.folder_parsers import EXPORT_OPTIONS, export_parser
from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.export.export_folder import check_replaceable
from peft_autoqra.export.gguf_recipe import TENSOR_TYPES_FILE, export_gguf_recipe
from peft_autoqra.export.merged_model import export_dequantized_base, export_merged_model, forecast_checkpoint
from peft_autoqra.export.plain_lora import export_plain_lora
from peft_autoqra.units import format_bytes

_LLAMA_CPP = "In llama.cpp's folder, with MERGED_MODEL written by autoqra export ADAPTER --to merged:"


def run(argv: Sequence[str]) -> Outcome:
    """Write an export, or say with ``--dry_run`` what would be written.

    Raises:
        AutoQRAError: the adapter or plan cannot be exported, or the output folder holds something else.
    """
    options = _parse(argv)
    if not options.dry_run:
        text, figures = _export(options, options.output_dir)
        return Outcome(text, {**_common(options), **figures, "file_bytes": _file_bytes(options.output_dir)})
    if options.to in ("merged", "base"):
        return _forecast(options)
    check_replaceable(options.output_dir.resolve())
    with tempfile.TemporaryDirectory() as directory:  # these are small, so they are made to be weighed
        _, figures = _export(options, Path(directory, "export"))
        sizes = _file_bytes(Path(directory, "export"))
    total = format_bytes(sum(sizes.values()))
    return Outcome(
        f"Nothing was written: dry run. It would be {', '.join(sizes)} in {options.output_dir}, {total}.",
        {**_common(options), **figures, "file_bytes": sizes},
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = export_parser()
    options: argparse.Namespace = parser.parse_args(argv)
    for name in ("rank", "dtype", "model_name_or_path"):
        if getattr(options, name) is not None and name not in EXPORT_OPTIONS[options.to]:
            parser.error(f"--{name} does not go with --to {options.to}")
    return options


def _common(options: argparse.Namespace) -> dict[str, Any]:
    return {"dry_run": options.dry_run, "format": options.to, "output_dir": str(options.output_dir)}


def _export(options: argparse.Namespace, output_dir: Path) -> tuple[str, dict[str, Any]]:
    """What was written, for people and for programs."""
    if options.to == "plain-lora":
        lora = export_plain_lora(options.folder, output_dir, rank=options.rank)
        max_rank = lora.vllm_max_lora_rank
        vllm = f"--max-lora-rank {max_rank} or more" if max_rank else "takes no rank this large"
        text = f"{output_dir}\nrank {lora.config.r} everywhere; vLLM: {vllm}"
        return text, {"rank": lora.config.r, "vllm_max_lora_rank": max_rank}
    if options.to == "gguf":
        recipe = export_gguf_recipe(options.folder, output_dir, model_name_or_path=options.model_name_or_path)
        commands = recipe.commands(output_dir.resolve())
        text = f"{output_dir / TENSOR_TYPES_FILE}\n{recipe.summary()}\n\n{_LLAMA_CPP}\n{commands}"
        return text, {"summary": recipe.summary(), "commands": commands, "gguf_bytes": recipe.num_bytes}
    export = export_merged_model if options.to == "merged" else export_dequantized_base
    export(options.folder, output_dir, model_name_or_path=options.model_name_or_path, dtype=_dtype(options))
    return str(output_dir), {}


def _forecast(options: argparse.Namespace) -> Outcome:
    forecast = forecast_checkpoint(
        options.folder, options.output_dir, model_name_or_path=options.model_name_or_path, dtype=_dtype(options)
    )
    dtype = str(forecast.dtype).removeprefix("torch.")
    text = (
        f"Nothing was written: dry run. It would be {format_bytes(forecast.weight_bytes)} of weights ({dtype}) in "
        f"{options.output_dir}, with {len(forecast.tokenizer_files)} files of the tokenizer. {forecast.base} would be "
        "loaded into memory for it."
    )
    figures = {"base": forecast.base, "dtype": dtype, "weight_bytes": forecast.weight_bytes}
    return Outcome(text, {**_common(options), **figures, "tokenizer_files": list(forecast.tokenizer_files)})


def _dtype(options: argparse.Namespace) -> torch.dtype | None:
    return getattr(torch, options.dtype) if options.dtype else None


def _file_bytes(directory: Path) -> dict[str, int]:
    return {p.relative_to(directory).as_posix(): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}
