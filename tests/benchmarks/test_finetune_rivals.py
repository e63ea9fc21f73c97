"""Rivals of the fine-tuning benchmark: prepared and trained by their own libraries, with the bytes they predict."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback

from benchmarks.finetune.method import Method, NotApplicable, Prepared
from benchmarks.finetune.methods import adalora, eva, loftq, lora, qlora
from benchmarks.finetune.methods.eva import Eva
from benchmarks.finetune.methods.loftq import LoftQ
from benchmarks.finetune.methods.qlora import Qlora
from benchmarks.finetune.tensor_bytes import measured_bytes
from benchmarks.finetune.training import PlainLossTrainer
from peft_autoqra.evaluation.sft import quiet_arguments
from tests.benchmarks.tiny_setting import MAX_STEPS, TinySetting, tiny_setting
from tests.conftest import TinyLlamaFactory

METHODS = {method.name: method for module in (lora, qlora, loftq, adalora, eva) for method in module.METHODS}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_llama: TinyLlamaFactory) -> TinySetting:
    return tiny_setting(tmp_path_factory.mktemp("rivals"), tiny_llama)


def prepare(method: Method, setting: TinySetting) -> Prepared:
    torch.manual_seed(0)
    return method.prepare(setting, None, setting.recipe.sft_config(setting.folder))


class AtEveryStep(TrainerCallback):
    """Bytes while gradients and optimizer states are there, and the adapters' gradients."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self.bytes = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        names = self._prepared.module_names
        self.bytes.append(measured_bytes(self._prepared.model, names, kwargs["optimizer"]))


def train(prepared: Prepared, setting: TinySetting, num_steps: int) -> AtEveryStep:
    record = AtEveryStep(prepared)
    args = quiet_arguments(setting.recipe.sft_config(setting.folder), str(setting.folder))
    args.max_steps = num_steps
    PlainLossTrainer(
        model=prepared.model,
        args=args,
        train_dataset=setting.data.train,
        processing_class=setting.data.processing_class,
        callbacks=[*prepared.callbacks, record],
    ).train()
    return record


def test_names_are_those_of_the_tables() -> None:
    assert list(METHODS) == [
        "lora-r16",
        "qlora-r4",
        "qlora-r8",
        "qlora-r16",
        "qlora-r16-bf16",
        "qlora-r64",
        "qlora-rslora-r64",
        "qlora-loftq-r16",
        "qlora-adalora",
        "qlora-eva-r16",
    ]


@pytest.mark.parametrize("name", METHODS)
def test_takes_the_bytes_that_it_predicts(name: str, setting: TinySetting) -> None:
    prepared = prepare(METHODS[name], setting)
    assert set(train(prepared, setting, 2).bytes) == {prepared.predicted}


@pytest.mark.parametrize("name", METHODS)
def test_trains_adapters_on_every_linear_layer_but_the_head(name: str, setting: TinySetting) -> None:
    prepared = prepare(METHODS[name], setting)
    layers = {n: m for n, m in prepared.model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert set(layers) == set(prepared.module_names)
    assert len(layers) == 14
    expected = torch.nn.Linear if name == "lora-r16" else bnb.nn.Linear4bit
    assert {type(layer.get_base_layer()) for layer in layers.values()} == {expected}
    before = {n: p.detach().clone() for n, p in prepared.model.named_parameters() if p.requires_grad}
    train(prepared, setting, 2)
    after = {n: p.detach() for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in after.values()} == {torch.bfloat16 if name.endswith("bf16") else torch.float32}
    assert before.keys() == after.keys()
    assert all("lora_" in n for n in after)
    assert all(not torch.equal(before[n], after[n]) for n in after)


def test_qlora_double_quantizes_to_nf4(setting: TinySetting) -> None:
    model = prepare(Qlora(rank=4), setting).model
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    states = [layer.weight.quant_state for layer in layers]
    assert {(state.quant_type, state.nested, state.dtype) for state in states} == {("nf4", True, torch.bfloat16)}


def test_scalings(setting: TinySetting) -> None:
    def scaling(method: Method) -> set[float]:
        modules = prepare(method, setting).model.modules()
        return {module.scaling["default"] for module in modules if isinstance(module, LoraLayer)}

    assert scaling(METHODS["qlora-r16"]) == {2.0}
    assert scaling(METHODS["qlora-r64"]) == {0.5}
    assert scaling(METHODS["qlora-rslora-r64"]) == {4.0}
    assert scaling(METHODS["qlora-loftq-r16"]) == {1.0}


def test_an_evaluation_before_training_leaves_the_quantized_weights(setting: TinySetting) -> None:
    model = prepare(Qlora(rank=4), setting).model
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    before = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(12)[None])
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


# --------------------------------------------------------------------------------------------------------------- LoftQ


def test_loftq_starts_at_the_best_correction_of_its_rank(setting: TinySetting) -> None:
    dense = setting.load_base()
    prepared = prepare(LoftQ(rank=4), setting)
    for name in prepared.module_names:
        layer = prepared.model.get_base_model().get_submodule(name)
        state = layer.weight.quant_state
        lost = (
            dense.get_submodule(name).weight.detach() - bnb.functional.dequantize_4bit(layer.weight.data, state)
        ).float()
        left = (lost - layer.get_delta_weight("default").detach()).norm().item()
        assert left == pytest.approx(torch.linalg.svdvals(lost)[4:].norm().item(), rel=1e-2)
    assert prepared.spent.seconds > 0
    assert prepared.spent.cost == 0


# ------------------------------------------------------------------------------------------------------------- AdaLoRA


def test_adalora_gives_up_ranks_to_its_target(setting: TinySetting) -> None:
    prepared = prepare(METHODS["qlora-adalora"], setting)
    train(prepared, setting, MAX_STEPS)
    layers = [module for module in prepared.model.modules() if isinstance(module, AdaLoraLayer)]
    kept = [int((layer.lora_E["default"] != 0).sum()) for layer in layers]
    assert sum(kept) == pytest.approx(16 * len(layers), abs=1)
    assert len(set(kept)) > 1


def test_the_orthogonal_regularization_is_in_the_loss_that_is_trained_on(setting: TinySetting) -> None:
    def gradients(weight: float) -> list[torch.Tensor]:
        prepared = prepare(METHODS["qlora-adalora"], setting)
        prepared.model.peft_config["default"].orth_reg_weight = weight
        seen = []

        class Gradients(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                named = prepared.model.named_parameters()
                seen.extend(p.grad.clone() for n, p in named if "lora_A" in n or "lora_B" in n)

        args = quiet_arguments(setting.recipe.sft_config(setting.folder), str(setting.folder))
        args.max_steps, args.max_grad_norm = 1, 0.0
        data = setting.data
        PlainLossTrainer(
            model=prepared.model,
            args=args,
            train_dataset=data.train,
            processing_class=data.processing_class,
            callbacks=[Gradients()],
        ).train()
        return seen

    assert all(not gradient.any() for gradient in gradients(0.0))  # singular values start at 0
    assert all(gradient.any() for gradient in gradients(0.5))


# ----------------------------------------------------------------------------------------------------------------- EVA


def test_eva_starts_at_directions_of_the_inputs_and_counts_its_tokens(setting: TinySetting) -> None:
    prepared = prepare(Eva(rank=4, rho=1.0), setting)
    for module in prepared.model.modules():
        if isinstance(module, LoraLayer):
            down = module.lora_A["default"].weight
            torch.testing.assert_close(down @ down.T, torch.eye(4), atol=1e-3, rtol=0)
            assert not module.lora_B["default"].weight.any()
    assert prepared.spent.seconds > 0
    passes = prepared.spent.cost * 2 * MAX_STEPS
    assert passes == pytest.approx(round(passes))
    assert passes >= 2
    assert prepared.mean_rank == 4


def test_eva_passes_its_tokens_once_for_all_seeds_and_learning_rates(setting: TinySetting) -> None:
    first, again = (prepare(Eva(rank=3, rho=2.0), setting) for _ in range(2))
    assert first.spent == again.spent
    assert len(list(setting.folder.glob("qlora-eva-r3-rho2.0.safetensors"))) == 1
    weights = [dict(prepared.model.named_parameters()) for prepared in (first, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_eva_moves_ranks_within_what_rho_allows(setting: TinySetting) -> None:
    prepared = prepare(Eva(rank=4, rho=2.0), setting)
    ranks = eva.adapter_ranks(prepared.model)
    assert max(ranks.values()) <= 8
    assert sum(ranks.values()) == 4 * len(prepared.module_names)
    assert len(set(ranks.values())) > 1


def test_eva_refuses_batches_that_its_loop_would_wait_for_forever(setting: TinySetting) -> None:
    with pytest.raises(NotApplicable, match="predicted tokens"):
        prepare(Eva(rank=64, rho=1.0), setting)
