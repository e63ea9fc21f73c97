"""Bits per module as AutoRound's AutoScheme chooses them, for many average widths from one pass over the model.

Runs in an environment of its own, since AutoRound brings its own versions of what this package needs too, and imports
nothing of this package:

    python -m venv autoround-venv
    autoround-venv/bin/pip install torch==2.13.0 auto-round==0.16.1
    autoround-venv/bin/python scripts/allocate_autoround.py --model MODEL --texts TEXTS --avg-bits 3 4 --output OUTPUT

Without a GPU install torch's CPU build first. The benchmark reads benchmarks/finetune/autoround/MODEL-TASK.json. Such
a file lists, for every average, the bits of ``modules`` in their order; ``seconds`` is what one allocation takes,
scoring included.

What AutoScheme does: every option is applied to all modules at once, rounded to nearest; the absolute products of
weight gradients and weight errors, summed, are a module's loss at that option; a dynamic program then minimizes their
sum at a given average width. An average width counts, besides the codes, a 16-bit scale and one more code (the zero)
for every group, 16-bit modules as 16, and only the modules allocated: the linear layers of the decoder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # texts that cannot be used must be an error, not another data set
os.environ.setdefault("AR_LOG_LEVEL", "WARNING")  # else it prints every allocation

import torch
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DENSE_BITS = 16
BATCH_SIZE = 8  # AutoScheme's own


def main() -> None:
    """Score the options once, allocate for every average, write the result."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        # AutoScheme keeps scores by the name of the texts' file, whatever it holds: never share them between runs.
        os.environ["AR_AUTO_SCHEME_CACHE"] = folder
        started = time.perf_counter()
        generator = make_generator(options, Path(folder) / "texts.jsonl")
        names = list(generator.quant_layer_names)
        allocations, seconds = [], 0.0
        for average in generator.auto_scheme.avg_bits:
            generator.auto_scheme.avg_bits = average
            chosen = generator.get_layer_config()
            allocations.append({"avg_bits": average, "bits": [chosen[name]["bits"] for name in names]})
            seconds = seconds or time.perf_counter() - started  # only the first has to score
    result = {
        "modules": names,
        "allocations": allocations,
        "group_size": options.group_size,
        "options": options.options,
        "num_sequences": options.num_sequences,
        "sequence_length": options.sequence_length,
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("auto-round", "torch", "transformers")},
        "command": shlex.join(sys.argv).replace(str(Path.home()), "~"),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of an unquantized model")
    parser.add_argument("--texts", type=Path, required=True, help="JSONL with prompt and completion, or text")
    parser.add_argument("--avg-bits", type=float, nargs="+", required=True, help="average widths to allocate for")
    parser.add_argument("--options", type=int, nargs="+", default=[2, 3, 4, 8, DENSE_BITS], help="bits of a module")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-sequences", type=int, default=16, help="AutoScheme's default")
    parser.add_argument("--sequence-length", type=int, default=256, help="likewise; texts are packed to it")
    parser.add_argument("--num-texts", type=int, default=1000, help="examples that texts are taken of, from the front")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def write_texts(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """The examples in the form that AutoRound reads: it drops shorter texts than a sequence, so they are packed.

    Its own packing (``:concat=True``) fails on files with auto-round 0.16.1 and datasets 5.2.
    """
    texts, parts, length = [], [], 0
    with options.texts.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, options.num_texts)]
    for row in rows:
        parts.append((row["text"] if "text" in row else row["prompt"] + row["completion"]) + tokenizer.eos_token)
        length += len(tokenizer(parts[-1])["input_ids"])
        if length >= options.sequence_length:
            texts.append({"text": "".join(parts)})
            parts, length = [], 0
    if len(texts) < options.num_sequences:
        sys.exit(
            f"{options.texts} fills {len(texts)} sequences of {options.sequence_length} tokens, not "
            f"{options.num_sequences}; give more texts or lower --num-sequences."
        )
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")


def make_generator(options: argparse.Namespace, texts: Path) -> GenScheme:
    """AutoScheme on the model and the texts."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    write_texts(options, tokenizer, texts)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    scheme = AutoScheme(
        avg_bits=sorted(set(options.avg_bits)),
        options=[option_of(bits, options.group_size) for bits in options.options],
        nsamples=options.num_sequences,
        seqlen=options.sequence_length,
        batch_size=BATCH_SIZE,
        low_cpu_mem_usage=False,
    )
    names = decoder_linears(model)
    return GenScheme(scheme, model, names, {}, dataset=str(texts), device_map="cpu", tokenizer=tokenizer)


def decoder_linears(model: PreTrainedModel) -> list[str]:
    """Linear layers but the head."""
    head = model.get_output_embeddings()
    return [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and layer is not head]


def option_of(bits: int, group_size: int) -> QuantizationScheme:
    """A choice for a module, symmetric as is AutoRound's default."""
    return QuantizationScheme(bits=bits, group_size=group_size, act_bits=16)


if __name__ == "__main__":
    main()
