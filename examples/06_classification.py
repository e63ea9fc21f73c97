"""A classifier on a quantized language model: the new head is trained whole, beside the adapters.

    python examples/06_classification.py --bits 3 --rank 8

The head ("score") is not quantized: all linear layers but heads are. PEFT trains and saves it for task_type SEQ_CLS.
"""

import argparse

import torch
from datasets import load_dataset
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from peft_autoqra import AutoQRAConfig  # importing the package registers the method with PEFT


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the examples whose largest logit is the label's."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """Train, evaluate, save, reload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3, help="2, 3, 4, 8 or 16")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="hub id or folder")
    parser.add_argument("--dataset", default="stanfordnlp/imdb", help="with columns text and label; train and test")
    parser.add_argument("--num_labels", type=int, default=2)
    parser.add_argument("--output_dir", default="adapter-classifier")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=128, help="tokens of a text")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def tokenized(row: dict[str, str]) -> dict[str, list[int]]:
        return tokenizer(row["text"], truncation=True, max_length=args.max_length)

    data = load_dataset(args.dataset).shuffle(seed=0).map(tokenized)
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=args.num_labels)
    base.config.pad_token_id = tokenizer.pad_token_id  # the model reads the last token that is no padding
    model = get_peft_model(base, AutoQRAConfig(bits=args.bits, r=args.rank, task_type="SEQ_CLS"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            learning_rate=5e-4,
            per_device_train_batch_size=8,
            max_steps=args.max_steps,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"].take(200),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    trainer.save_model(args.output_dir)

    model = AutoPeftModelForSequenceClassification.from_pretrained(args.output_dir, num_labels=args.num_labels)
    logits = model(input_ids=torch.tensor([data["test"][0]["input_ids"]])).logits
    print(f"label {int(logits.argmax())}, in the data {data['test'][0]['label']}")


if __name__ == "__main__":
    main()
