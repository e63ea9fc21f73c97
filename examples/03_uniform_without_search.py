"""No search: the same bits and rank everywhere, with calibrated quantization and calibrated initial adapters.

    python examples/03_uniform_without_search.py --bits 3 --rank 16

A few sequences of the training data calibrate the plan. Without them, `AutoQRAConfig(bits=3, r=16)` is all it takes:
rounding to the nearest code then, and adapters that start at zero.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_autoqra import AutoQRAConfig, calibrate_plan, uniform_plan
from peft_autoqra.evaluation.sft import SFTData


def main() -> None:
    """Calibrate, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3, help="2, 3, 4, 8 or 16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="hub id or folder with train and test files")
    parser.add_argument("--output_dir", default="adapter-uniform")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a sequence")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, test = (load_dataset(args.dataset, split=split) for split in ("train", "test"))
    recipe = SFTConfig(
        output_dir=args.output_dir,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        max_steps=args.max_steps,
        max_length=args.max_length,
        use_cpu=not torch.accelerator.is_available(),
    )
    data = SFTData(model, recipe, train, test, tokenizer)  # tokenized as the trainer will do it
    plan = calibrate_plan(uniform_plan(model, args.bits, args.rank), model, data.batches(data.train, 64))
    print(plan, f"{plan.memory.stored_bytes:,} bytes stored, {plan.memory.total_bytes:,} while training")

    trainer = SFTTrainer(
        model=model,
        args=recipe,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"),
    )
    trainer.train()
    print(f"held-out loss {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
