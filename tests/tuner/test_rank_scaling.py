"""Scaling by rank: against PEFT's own LoRA with another learning rate, and where it does not apply."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import BitRankPlan, LayerPlan
from peft_autoqra.tuner.config import AutoQRAConfig, exact_pattern
from peft_autoqra.tuner.dense_adapter import add_dense_adapter
from tests.conftest import TinyLlamaFactory
from tests.tuner.synthetic import calibrated_plan, logits, mixed_plan, random_calibration, randomize_adapters

IN, OUT = 24, 20
RANKS = (1, 3, 16, 20)


class OneLayer(nn.Module):
    """What a plan for one module, ``proj``, fits."""

    def __init__(self, make: Any = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = make(OUT, IN) if make is Conv1D else make(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def one_layer_plan(rank: int, bits: int = 16, **changes: Any) -> BitRankPlan:
    return BitRankPlan({"proj": LayerPlan(bits, rank)}, shapes={"proj": (OUT, IN)}, **changes)


def adapter_layer(model: nn.Module) -> LoraLayer:
    (layer,) = (module for module in model.modules() if isinstance(module, LoraLayer))
    return layer


def product(layer: LoraLayer) -> Tensor:
    """``[OUT, IN]``, also of a Conv1D."""
    lora_a, lora_b = (side["default"].weight.detach() for side in (layer.lora_A, layer.lora_B))
    return layer.scaling["default"] * lora_b @ lora_a


def train(model: nn.Module, learning_rate: float, num_steps: int) -> Tensor:
    """The product after some steps of Adam, which see nothing but the output."""
    generator = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate, eps=1e-30)
    for _ in range(num_steps):
        x, y = (torch.randn(8, size, generator=generator, dtype=torch.float64) for size in (IN, OUT))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return product(adapter_layer(model))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_adam_trains_as_with_rslora_and_another_learning_rate(rank: int, init: object) -> None:
    """Independent reference: PEFT's own LoRA on the same layer."""
    plain = LoraConfig(r=rank, target_modules=["proj"], lora_alpha=6, use_rslora=True, init_lora_weights=init)
    ours = AutoQRAConfig(plan=one_layer_plan(rank), lora_alpha=6, init_lora_weights=init)
    starts, ends = [], []
    for config, learning_rate in ((plain, 1e-2 * math.sqrt(16 / rank)), (ours, 1e-2)):
        base = OneLayer().double()
        torch.manual_seed(7)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        adapter_layer(model).to(torch.float64)
        starts.append(product(adapter_layer(model)))
        ends.append(train(model, learning_rate, num_steps=5))
    torch.testing.assert_close(starts[1], starts[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)
    assert (ends[0] - starts[0]).abs().max() > 0.05


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("make", [nn.Linear, Conv1D])
@pytest.mark.parametrize("add", [get_peft_model, add_dense_adapter])
def test_adapters_start_at_the_correction_at_every_rank(rank: int, make: Any, add: Any) -> None:
    base = OneLayer(make)
    plan = one_layer_plan(rank, bits=3, initialization="compensate")
    plan = plan.replace(calibration=random_calibration(base, plan))
    model = add(base, AutoQRAConfig(plan=plan, lora_alpha=6))
    correction = plan.calibration.corrections["proj"]
    expected = torch.from_numpy(correction.left).float() @ torch.from_numpy(correction.right).float()
    layer = adapter_layer(model)
    torch.testing.assert_close(product(layer), expected, rtol=1e-5, atol=1e-6)
    assert layer.scaling["default"] == pytest.approx(6 * 16 / rank**1.5)
    rows = torch.from_numpy(correction.right).float() * math.sqrt(rank / 16)
    torch.testing.assert_close(layer.lora_A["default"].weight.detach(), rows)


def test_modules_of_16_bits_beside_compensated_ones_start_at_zero_with_longer_rows(
    tiny_llama: TinyLlamaFactory,
) -> None:
    base = tiny_llama()
    plan = calibrated_plan(base)
    torch.manual_seed(3)
    ours = get_peft_model(base, AutoQRAConfig(plan=plan))
    torch.manual_seed(3)
    plain = get_peft_model(tiny_llama(), AutoQRAConfig(plan=plan, use_rslora=False))
    dense = [name for name, layer in plan.items() if layer.bits == 16 and layer.rank]
    assert dense
    for name in dense:
        layer, reference = (model.get_base_model().get_submodule(name) for model in (ours, plain))
        rows = reference.lora_A["default"].weight * math.sqrt(plan[name].rank / 16)
        torch.testing.assert_close(layer.lora_A["default"].weight, rows)
        assert not layer.lora_B["default"].weight.any()


def test_nothing_changes_at_rank_16(tiny_llama: TinyLlamaFactory) -> None:
    plan = mixed_plan(tiny_llama())
    plan = plan.replace(layers={name: LayerPlan(layer.bits, 16) for name, layer in plan.items()})
    assert AutoQRAConfig(plan=plan).alpha_pattern == {}
    states = []
    for config in (AutoQRAConfig(plan=plan), LoraConfig(r=16, target_modules=list(plan), use_rslora=True)):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), config)
        states.append({name: tensor for name, tensor in model.state_dict().items() if "lora_" in name})
        assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)} == {8 / 4}
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"alpha_pattern": {"proj": 3}}, 3 / 2),
        ({"alpha_pattern": {"^proj": 5.5}}, 5.5 / 2),
        ({"use_rslora": False}, 8 / 4),
        ({"use_rslora": False, "lora_alpha": 2}, 2 / 4),
    ],
)
def test_the_users_own_scaling_wins_and_leaves_the_rows_alone(settings: dict[str, Any], scaling: float) -> None:
    config = AutoQRAConfig(plan=one_layer_plan(4), **settings)
    assert config.alpha_pattern == settings.get("alpha_pattern", {})
    assert start_of(config) == (pytest.approx(scaling), pytest.approx(plain_rows(4)))


def test_without_a_plan_scaling_is_that_of_rslora_also_for_copies() -> None:
    """Applying a configuration fills in its plan, which is no reason to scale by rank."""
    config = AutoQRAConfig(bits=16, r=4, target_modules=["proj"])
    assert start_of(config) == (8 / 2, pytest.approx(plain_rows(4)))
    assert config.plan is not None
    assert start_of(config) == (8 / 2, pytest.approx(plain_rows(4)))
    assert start_of(replace(config)) == (8 / 2, pytest.approx(plain_rows(4)))


def test_an_embedding_beside_quantized_layers_can_have_an_adapter(tiny_llama: TinyLlamaFactory) -> None:
    base = tiny_llama(tie_word_embeddings=False)
    config = AutoQRAConfig(r=4, target_modules=["embed_tokens", "q_proj"], bits_pattern={"embed_tokens": 16})
    model = get_peft_model(base, config)
    assert model.get_base_model().get_submodule("model.embed_tokens").scaling == {"default": 8 / 2}


def start_of(config: AutoQRAConfig) -> tuple[float, float]:
    """Scaling, and how long the rows of A are together."""
    torch.manual_seed(7)
    layer = adapter_layer(get_peft_model(OneLayer(), config))
    return layer.scaling["default"], float(layer.lora_A["default"].weight.detach().norm())


def plain_rows(rank: int) -> float:
    torch.manual_seed(7)
    model = get_peft_model(OneLayer(), LoraConfig(r=rank, target_modules=["proj"]))
    return float(adapter_layer(model).lora_A["default"].weight.detach().norm())


def test_alphas_follow_lora_alpha_and_fill_adapter_config(tmp_path: Path) -> None:
    layers = {"a.b": LayerPlan(3, 12), "c": LayerPlan(3, 16), "d": LayerPlan(4, 0), "e": LayerPlan(16, 64)}
    config = AutoQRAConfig(plan=layers, lora_alpha=7)
    assert config.alpha_pattern == {exact_pattern("a.b"): 7 * 16 / 12, "^e": 7 / 4}
    assert replace(config).alpha_pattern == config.alpha_pattern
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alpha_pattern"] == config.alpha_pattern
    assert AutoQRAConfig.from_pretrained(tmp_path).alpha_pattern == config.alpha_pattern


@pytest.mark.parametrize(("alpha", "rank"), [(1e308, 1), (5e-324, 64)])
def test_alphas_beyond_floats_are_refused(alpha: float, rank: int) -> None:
    with pytest.raises(InvalidPlanError, match=r"alpha_pattern is (inf|0\.0)"):
        AutoQRAConfig(plan={"proj": LayerPlan(16, rank)}, lora_alpha=alpha)  # type: ignore[arg-type]


def test_adapters_saved_before_this_rule_load_and_train_on_as_they_were(
    tiny_llama: TinyLlamaFactory, tmp_path: Path
) -> None:
    """Their adapter_config.json has ranks and no alphas."""
    plan = mixed_plan(tiny_llama())
    model = get_peft_model(tiny_llama(), AutoQRAConfig(plan=plan, alpha_pattern={".*proj": 8}))
    randomize_adapters(model)
    before = logits(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {}}))
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), before)
    config = again.peft_config["default"]
    assert config.alpha_pattern == replace(config).alpha_pattern == {}
    assert not any(map(config.scales_by_rank, plan))


def test_adapters_of_other_ranks_and_of_the_earlier_rule_are_hot_swapped(
    tiny_llama: TinyLlamaFactory, tmp_path: Path
) -> None:
    plan = mixed_plan(tiny_llama())
    narrow = plan.replace(layers={n: LayerPlan(layer.bits, min(layer.rank, 2)) for n, layer in plan.items()})
    configs = {
        "wide": AutoQRAConfig(plan=plan),
        "narrow": AutoQRAConfig(plan=narrow),
        "earlier": AutoQRAConfig(plan=plan, alpha_pattern={"q_proj": 8}),
    }
    expected = {}
    for seed, (name, config) in enumerate(configs.items()):
        model = get_peft_model(tiny_llama(), config)
        randomize_adapters(model, seed)
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "wide")
    for name in ("narrow", "earlier", "wide"):
        hotswap_adapter(model, tmp_path / name, adapter_name="default", torch_device="cpu")
        assert torch.equal(logits(model), expected[name])
