"""An encoder-decoder model: T5 quantized uniformly, trained with Seq2SeqTrainer on pairs of texts.

    python examples/05_seq2seq.py --bits 4 --rank 16

Search and calibration are for causal language models, so bits and rank are the same everywhere here. They may also
follow patterns, such as `bits_pattern={"wo": 8}` for the last projection of every feed-forward layer, or a plan made
by hand.
"""

import argparse

import torch
from datasets import load_dataset
from peft import AutoPeftModelForSeq2SeqLM, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from peft_autoqra import AutoQRAConfig  # importing the package registers the method with PEFT


def main() -> None:
    """Train, save, reload, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, help="2, 3, 4, 8 or 16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--model", default="google-t5/t5-small", help="hub id or folder")
    parser.add_argument(
        "--dataset", default="knkarthick/dialogsum", help="hub id or folder with a train and test file"
    )
    parser.add_argument("--source", default="dialogue", help="column that the encoder reads")
    parser.add_argument("--target", default="summary", help="column that the decoder writes")
    parser.add_argument("--output_dir", default="adapter-seq2seq")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a text")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def tokenized(row: dict[str, str]) -> dict[str, list[int]]:
        cut = {"truncation": True, "max_length": args.max_length}
        return tokenizer(row[args.source], text_target=row[args.target], **cut)

    train, test = (load_dataset(args.dataset, split=split).map(tokenized) for split in ("train", "test"))
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model)
    config = AutoQRAConfig(bits=args.bits, r=args.rank, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config)  # quantizes in place, adds adapters
    model.print_trainable_parameters()
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=args.output_dir,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            max_steps=args.max_steps,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    trainer.train()
    print(f"held-out loss {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model(args.output_dir)

    model = AutoPeftModelForSeq2SeqLM.from_pretrained(args.output_dir)  # quantizes to the same codes again
    text = tokenizer(test[0][args.source], truncation=True, max_length=args.max_length, return_tensors="pt")
    print(tokenizer.decode(model.generate(**text, max_new_tokens=40)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
