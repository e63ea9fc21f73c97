"""Preference tuning: DPO on a calibrated 4-bit plan, or on the plan of a search.

    python examples/07_preference_tuning.py --plan search-out/plan

A calibrated adapter starts at the correction of the quantization error. DPO compares with a reference model, and the
reference should have that correction too. So the model is wrapped first, and TRL keeps a copy of the adapter as it
started. With `DPOTrainer(model=base, peft_config=config)` the reference would be the quantized base without it.
"""

import argparse

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

from peft_autoqra import AutoQRAConfig, BitRankPlan, calibrate_plan, uniform_plan


def main() -> None:
    """Calibrate unless a plan is given, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", help="folder or hub id of a plan; 4 bits and rank 16 everywhere by default")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    parser.add_argument(
        "--dataset", default="trl-lib/ultrafeedback_binarized", help="with columns chosen and rejected"
    )
    parser.add_argument("--output_dir", default="adapter-dpo")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a prompt with an answer")
    args = parser.parse_args()

    base = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = load_dataset(args.dataset, split="train")
    if args.plan:
        plan = BitRankPlan.from_pretrained(args.plan)
    else:
        rows = [maybe_apply_chat_template(maybe_extract_prompt(row), tokenizer) for row in train.take(32)]
        texts = [row["prompt"] + row["chosen"] for row in rows]
        cut = {"truncation": True, "max_length": args.max_length, "return_tensors": "pt"}
        plan = calibrate_plan(uniform_plan(base, 4, 16), base, [tokenizer(text, **cut) for text in texts])
    print(plan)

    trainer = DPOTrainer(
        model=get_peft_model(base, AutoQRAConfig(plan=plan, task_type="CAUSAL_LM")),
        args=DPOConfig(
            output_dir=args.output_dir,
            learning_rate=1e-4,
            per_device_train_batch_size=2,
            max_steps=args.max_steps,
            max_length=args.max_length,
            logging_steps=10,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=train,
        processing_class=tokenizer,
    )
    print(f"adapters: {', '.join(trainer.model.peft_config)}")  # "ref" is the adapter as it started
    trainer.train()
    trainer.model.save_pretrained(args.output_dir, selected_adapters=["default"])
    tokenizer.save_pretrained(args.output_dir)
    print(f"adapter in {args.output_dir}")


if __name__ == "__main__":
    main()
