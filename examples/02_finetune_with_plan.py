"""Fine-tune with a plan, save the adapter, and load it again.

python examples/02_finetune_with_plan.py --plan search-out/plan --output_dir adapter
"""

import argparse

import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_autoqra import AutoQRAConfig, BitRankPlan  # importing the package registers the method with PEFT


def main() -> None:
    """Train, save, reload, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="search-out/plan", help="folder or hub id")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the plan's base model")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="hub id or folder with a train file")
    parser.add_argument("--output_dir", default="adapter")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a sequence")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=SFTConfig(
            output_dir=args.output_dir,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            max_steps=args.max_steps,
            max_length=args.max_length,
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=load_dataset(args.dataset, split="train"),
        processing_class=tokenizer,
        peft_config=AutoQRAConfig(plan=BitRankPlan.from_pretrained(args.plan), task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(args.output_dir)

    # Loading quantizes the base model again, to the same codes.
    model = AutoPeftModelForCausalLM.from_pretrained(args.output_dir)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    tokens = model.generate(input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=20)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
