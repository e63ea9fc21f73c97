"""The promises that matter most, on a real pretrained model."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_autoqra import AutoQRAConfig, BitRankPlan, LayerPlan, MemoryModel, calibrate_plan, uniform_plan
from peft_autoqra.evaluation.held_out import held_out_loss
from peft_autoqra.memory_measurement import measure_memory

pytestmark = pytest.mark.integration

BITS = (2, 3, 4, 8, 16)
RANKS = (0, 2, 4, 8)


@pytest.fixture(scope="module")
def batches(demo_assets):
    tokenizer = AutoTokenizer.from_pretrained(demo_assets.model)

    def read(split: str, count: int) -> list[dict[str, torch.Tensor]]:
        lines = (demo_assets.imdb / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [tokenizer(json.loads(line)["text"]).input_ids[:64] for line in lines]
        ids = torch.tensor([row for row in rows if len(row) == 64])
        return [{"input_ids": part, "labels": part} for part in ids.split(8)]

    return read


def load(demo_assets):
    return AutoModelForCausalLM.from_pretrained(demo_assets.model, dtype=torch.bfloat16).eval()


@torch.no_grad()
def logits(model, batch):
    return model.eval()(input_ids=batch["input_ids"]).logits


def mixed_plan(model) -> BitRankPlan:
    names = list(MemoryModel.from_model(model).modules)
    return BitRankPlan({name: LayerPlan(BITS[i % 5], RANKS[i % 4]) for i, name in enumerate(names)})


def test_mixed_plan_reloads_to_the_last_bit_and_takes_the_estimated_bytes(demo_assets, batches, tmp_path):
    batch = batches("dev", 2)[0]
    model = load(demo_assets)
    plan = calibrate_plan(mixed_plan(model), model, batches("train", 8))
    estimate = MemoryModel.from_model(model).estimate(plan)
    plan.save_pretrained(tmp_path / "plan")
    tuned = get_peft_model(model, AutoQRAConfig(plan=plan, task_type="CAUSAL_LM"))
    start = logits(tuned, batch)
    again = get_peft_model(load(demo_assets), AutoQRAConfig(plan=str(tmp_path / "plan")))
    assert (logits(again, batch) - start).abs().max() == 0.0
    optimizer = torch.optim.AdamW(p for p in tuned.parameters() if p.requires_grad)
    tuned(**batch).loss.backward()
    optimizer.step()
    assert measure_memory(tuned, plan, optimizer) == estimate
    trained = logits(tuned, batch)
    assert (trained - start).abs().max() > 0
    tuned.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(load(demo_assets), tmp_path / "adapter")
    assert (logits(reloaded, batch) - trained).abs().max() == 0.0


def test_three_calibrated_bits_start_near_four_of_qlora(demo_assets, batches):
    held_out = batches("dev", 12)
    model = load(demo_assets)
    unquantized = held_out_loss(model, held_out).mean
    plan = calibrate_plan(uniform_plan(model, 3, 16), model, batches("train", 16))
    compensated = held_out_loss(get_peft_model(model, AutoQRAConfig(plan=plan)), held_out).mean
    zero_start = held_out_loss(get_peft_model(load(demo_assets), AutoQRAConfig(bits=3, r=16)), held_out).mean
    nf4 = AutoQRAConfig(bits=4, r=16, quant_backend="bitsandbytes")
    qlora = held_out_loss(get_peft_model(load(demo_assets), nf4), held_out).mean
    assert unquantized < compensated < zero_start - 0.1
    assert compensated < qlora + 0.15
