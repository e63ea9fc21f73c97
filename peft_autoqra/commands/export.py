"""``autoqra export``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from peft_autoqra.export.gguf_recipe import TENSOR_TYPES_FILE, export_gguf_recipe
from peft_autoqra.export.merged_model import export_dequantized_base, export_merged_model
from peft_autoqra.export.plain_lora import export_plain_lora

_LLAMA_CPP = "In llama.cpp's folder, with MERGED_MODEL written by autoqra export ADAPTER --to merged:"
_DTYPES = ("bfloat16", "float16", "float32")
_OPTIONS_OF = {
    "plain-lora": ("rank",),
    "merged": ("model_name_or_path", "dtype"),
    "base": ("model_name_or_path", "dtype"),
    "gguf": ("model_name_or_path",),
}


def run(argv: Sequence[str]) -> int:
    """Write an export and print where it is; returns the exit status.

    Raises:
        AutoQRAError: the adapter or plan cannot be exported, or the output folder holds something else.
    """
    options = _parse(argv)
    output_dir: Path = options.output_dir
    if options.to == "plain-lora":
        lora = export_plain_lora(options.folder, output_dir, rank=options.rank)
        max_rank = lora.vllm_max_lora_rank
        vllm = f"--max-lora-rank {max_rank} or more" if max_rank else "takes no rank this large"
        print(f"{output_dir}\nrank {lora.config.r} everywhere; vLLM: {vllm}")  # noqa: T201
    elif options.to == "gguf":
        recipe = export_gguf_recipe(options.folder, output_dir, model_name_or_path=options.model_name_or_path)
        commands = recipe.commands(output_dir.resolve())
        print(f"{output_dir / TENSOR_TYPES_FILE}\n{recipe.summary()}\n\n{_LLAMA_CPP}\n{commands}")  # noqa: T201
    else:
        export = export_merged_model if options.to == "merged" else export_dequantized_base
        dtype = getattr(torch, options.dtype) if options.dtype else None
        export(options.folder, output_dir, model_name_or_path=options.model_name_or_path, dtype=dtype)
        print(output_dir)  # noqa: T201
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="autoqra export",
        description="Write what was trained for tools that do not know this package.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="saved adapter, or for gguf a plan; a folder or hub id")
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(_OPTIONS_OF),
        help="ordinary LoRA of one rank; the model with the adapter merged; the dequantized base without it, which "
        "plain-lora fits exactly; or tensor types for llama.cpp's llama-quantize",
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="new, empty or an earlier export")
    parser.add_argument("--rank", type=int, help="plain-lora: pad to this rank; the adapter's largest by default")
    parser.add_argument("--dtype", choices=_DTYPES, help="merged, base: of the weights; the base model's by default")
    parser.add_argument(
        "--model_name_or_path", help="merged, base, gguf: the base model, where it is not where it was in training"
    )
    options = parser.parse_args(argv)
    for name in ("rank", "dtype", "model_name_or_path"):
        if getattr(options, name) is not None and name not in _OPTIONS_OF[options.to]:
            parser.error(f"--{name} does not go with --to {options.to}")
    return options
