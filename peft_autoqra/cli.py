"""The command ``autoqra``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from peft_autoqra.errors import AutoQRAError

HELP = """\
usage: autoqra COMMAND [--config RECIPE.yaml] [--FIELD VALUE ...]

  search     find the weight bits and LoRA rank of every layer within a memory budget
  train      fine-tune with a plan, or with the same bits and rank everywhere
  evaluate   judge a model or an adapter: held-out loss, metrics, benchmark tasks; compare two
  report     write one HTML page about a search
  push       upload a plan, an adapter or a quantized base to the Hugging Face Hub
  export     write an adapter for vLLM, llama.cpp or transformers without this package
  calibrate  measure beforehand what every bit-width and rank of every layer loses; searches start from it

`autoqra COMMAND --help` lists its flags. Those of search, train and calibrate may stand in a YAML recipe too; their
--dry_run estimates memory and time.

  autoqra search --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --train_file data.jsonl \\
      --test_split_size 0.1 --memory_budget qlora-4bit-r16 --output_dir search-out
  autoqra train --config search-out/recipe.yaml --plan search-out/plan --output_dir search-out/adapter
  autoqra report search-out
  autoqra push search-out/adapter --repo_id me/my-adapter
"""
COMMANDS = ("calibrate", "search", "train", "evaluate", "report", "push", "export")
GOES_ON = ("calibrate", "search")
EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Args:
        argv: the command and its flags; the process's own by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(HELP, end="")  # noqa: T201
        return 0
    if command == "--version":
        print(f"autoqra {version('peft-autoqra')}")  # noqa: T201
        return 0
    if command not in COMMANDS:
        return _fail(f"{command!r} is no command; use one of {', '.join(COMMANDS)}.")
    # TRL passes transformers the old name of this setting; users can do nothing about it.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    try:
        # A command imports TRL and perhaps BoTorch, which takes seconds.
        return int(import_module(f"peft_autoqra.commands.{command}").run(arguments[1:]))
    except (AutoQRAError, OSError) as error:  # the latter: an output_dir that cannot be made, a full disk
        return _fail(f"{command}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        _fail(f"{command}: stopped" + ("; the same command goes on from here." if command in GOES_ON else "."))
        return EXIT_INTERRUPTED


def _fail(message: str) -> int:
    print(f"autoqra {message}" if message.startswith(COMMANDS) else f"autoqra: {message}", file=sys.stderr)  # noqa: T201
    return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
