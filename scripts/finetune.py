"""Fine-tune with a plan on one or more devices; the same as ``autoqra train``, for ``accelerate launch``.

    accelerate launch scripts/finetune.py --config recipe.yaml --plan search-out/plan --output_dir adapter

The first process alone prints and writes.
"""

import sys

from peft_autoqra.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
