"""Search a plan: the bits and LoRA rank of every linear layer that fit a memory budget.

    python examples/01_search.py --output_dir search-out

Stop it and type the same again: it goes on where it stopped.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from peft_autoqra import AutoQRASearchConfig, AutoQRASearcher
from peft_autoqra.report import write_report


def main() -> None:
    """Search and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="hub id or folder with train and test files")
    parser.add_argument(
        "--memory_budget", default="qlora-4bit-r16", help="bytes, 6GB, 3.2bit, 0.75*qlora-4bit-r16 ..."
    )
    parser.add_argument("--output_dir", default="search-out")
    parser.add_argument("--max_cost", type=float, default=1.0, help="of the search, in full fine-tunes")
    parser.add_argument("--max_trials", type=int, help="trials at most")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a sequence")
    args = parser.parse_args()

    searcher = AutoQRASearcher(
        AutoModelForCausalLM.from_pretrained(args.model),
        train_dataset=load_dataset(args.dataset, split="train"),
        eval_dataset=load_dataset(args.dataset, split="test"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        # The recipe of the real fine-tune; trials follow it for some of its steps.
        args=SFTConfig(
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            max_length=args.max_length,
            use_cpu=not torch.accelerator.is_available(),
        ),
        search_config=AutoQRASearchConfig(
            memory_budget=args.memory_budget,
            max_cost=args.max_cost,
            max_trials=args.max_trials,
            output_dir=args.output_dir,
        ),
    )
    result = searcher.run()

    print(result.plan)
    print(f"winner: loss {result.winner.loss:.4f}, found by {result.winner.first.origin}. {result.verdict}")
    for name, compared in result.baselines.items():
        print(f"{name}: " + ("failed" if compared.loss is None else f"loss {compared.loss:.4f}"))
    print(f"plan in {searcher.output_dir / 'plan'}, report in {write_report(searcher.output_dir)}")


if __name__ == "__main__":
    main()
