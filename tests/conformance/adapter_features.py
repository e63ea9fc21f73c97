"""The adapter interface of PEFT, row by row."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.tuners.lora.config import KasaConfig
from peft.utils.warning import PeftWarning
from torch import nn

from peft_autoqra import (
    AutoQRAConfig,
    AutoQRAQuantConfig,
    BitRankPlan,
    LayerPlan,
    MemoryModel,
    calibrate_plan,
    uniform_plan,
)
from peft_autoqra.errors import CalibrationError, InvalidPlanError, PlanMismatchError
from peft_autoqra.memory_measurement import measure_memory
from peft_autoqra.quant.backends import QUANTIZED_LAYERS
from peft_autoqra.quant.int8 import Int8Linear
from peft_autoqra.quant.nf4 import NF4Linear
from tests.conformance.building import (
    adapt,
    adapter_layers,
    assert_close,
    dense_reference,
    loss,
    outputs,
    planned,
    quantized_layers,
    trained,
    unchanged_if_refused,
)
from tests.conformance.feature import FeatureGroup, Refusal
from tests.conformance.models import ModelCase
from tests.tuner.synthetic import assert_unchanged, randomize_adapters, snapshot

GROUP = FeatureGroup("Adapters")
feature = GROUP.feature

FUSED = Refusal(
    error=InvalidPlanError,
    match=r"experts in fused parameters such as 'model\.layers\.0\.mlp\.experts\.gate_up_proj'",
    reason="The experts are fused 3-D parameters, which would stay at 16 bits; name the linear layers to quantize. "
    "The other rows name those of the attention, and a warning says what share of the weights stays at 16 bits.",
)


@feature("`AutoQRAConfig(bits=4)`: all linear layers but the head", refused={"Mixtral": FUSED})
def all_linear(case: ModelCase, _: Path) -> None:
    model = adapt(case, target_modules=None, bits=4)
    layers = adapter_layers(model)
    assert layers
    for module in case.make().modules():
        assert not isinstance(module, QUANTIZED_LAYERS)
    head = model.get_base_model().get_output_embeddings() if hasattr(model.get_base_model(), "lm_head") else None
    assert head is None or isinstance(head, nn.Linear)
    assert all(layer.get_base_layer().bits == 4 for layer in layers.values())


@feature("a plan: bits and rank of every layer")
def plan_of_every_layer(case: ModelCase, _: Path) -> None:
    base = case.make()
    plan = planned(case, base)
    model = adapt(case, base, plan=plan)
    layers = adapter_layers(model)
    assert layers.keys() == {name for name, layer in plan.items() if layer.rank}
    for name, layer in plan.items():
        module = base.get_submodule(name)
        found = layers[name].get_base_layer() if name in layers else module
        assert getattr(found, "bits", 16) == layer.bits
        assert name not in layers or layers[name].r["default"] == layer.rank
    randomize_adapters(model)
    assert_close(outputs(case, model), outputs(case, dense_reference(case, model)))


@feature("a training step moves the adapters and nothing else")
def training_step(case: ModelCase, _: Path) -> None:
    model = adapt(case, plan=planned(case, case.make())).train()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _step in range(2):  # lora_A gets no gradient while lora_B is zero
        optimizer.zero_grad()
        loss(case, model).backward()
        optimizer.step()
    for name, tensor in model.named_parameters():
        trains = "lora_" in name or ".modules_to_save." in name
        assert tensor.requires_grad == trains
        assert torch.equal(tensor, before[name]) != trains, name


@feature("NF4 and int8 of bitsandbytes", refused={"T5": Refusal(
    error=InvalidPlanError,
    match=r"wo' cannot be quantized to NF4: .*bits_pattern=\{'wo': 8\}",
    reason="T5 casts the inputs of `wo` to the dtype of its weight, in NF4 that of bytes; keep `wo` at 8 or 16 bits.",
)})  # fmt: skip
def bitsandbytes_layers(case: ModelCase, _: Path) -> None:
    for bits, kind in ((4, NF4Linear), (8, Int8Linear)):
        model = trained(case, bits=bits, quant_backend="bitsandbytes")
        assert all(isinstance(layer.get_base_layer(), kind) for layer in adapter_layers(model).values())
        assert_close(outputs(case, model), outputs(case, dense_reference(case, model)))


NO_CALIBRATION = {
    name: Refusal(error=CalibrationError, match=match, reason="Calibration and search are for causal language models.")
    for name, match in (
        ("T5", r"labels has shape \(2, 5\).* for causal language models"),
        ("Llama classifier", r"labels has shape \(2,\).* for causal language models"),
        ("ViT", "no token embeddings; calibration is for causal language models"),
    )
}


@feature("`calibrate_plan`: adapters start at the correction, closer to 16 bits", refused=NO_CALIBRATION)
def calibrated(case: ModelCase, _: Path) -> None:
    base = case.make()
    plan = uniform_plan(base, bits=3, rank=4, target_modules=case.target_modules)
    expected, before = outputs(case, base), snapshot(base)
    try:
        better = calibrate_plan(plan, base, [case.batch()])
    finally:
        assert_unchanged(base, before)
    errors = [(outputs(case, adapt(case, plan=found)) - expected).norm() for found in (plan, better)]
    assert errors[1] < 0.8 * errors[0]


@feature("several adapters of different ranks: add, set, delete")
def several_adapters(case: ModelCase, _: Path) -> None:
    base = case.make()
    plan = planned(case, base)
    model = trained(case, base, plan=plan)
    first = outputs(case, model)
    wider = plan.replace(layers={name: LayerPlan(layer.bits, 6) for name, layer in plan.items()})
    model.add_adapter("second", AutoQRAConfig(plan=wider, task_type=case.task_type))
    assert torch.equal(outputs(case, model), first)
    model.set_adapter("second")
    randomize_adapters(model, 1, "second")
    second = outputs(case, model)
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(outputs(case, model), first)
    model.delete_adapter("second")
    assert torch.equal(outputs(case, model), first)
    assert not any("second" in name for name, _ in model.named_parameters())


@feature("an adapter that wants other bits", refused=Refusal(
    error=InvalidPlanError, match="is quantized to 3 bits already", reason="All adapters of a model share its base.",
))  # fmt: skip
def other_bits(case: ModelCase, _: Path) -> None:
    model = trained(case)
    with unchanged_if_refused(model):
        try:
            model.add_adapter("other", AutoQRAConfig(bits=4, r=4, target_modules=case.target_modules))
        finally:
            assert list(model.peft_config) == ["default"]


@feature("a plain `LoraConfig` adapter on the mixed-bit base")
def plain_lora(case: ModelCase, tmp_path: Path) -> None:
    model = trained(case, plan=planned(case, case.make()))
    first = outputs(case, model)
    targets = list(adapter_layers(model))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=targets, task_type=case.task_type))
    model.set_adapter("plain")
    randomize_adapters(model, 1, "plain")
    plain = outputs(case, model)
    model.save_pretrained(tmp_path, selected_adapters=["plain"])
    assert not torch.equal(plain, first)
    again = adapt(case, plan=planned(case, case.make()))
    again.load_adapter(tmp_path / "plain", "plain")
    again.set_adapter("plain")
    assert torch.equal(outputs(case, again), plain)


@feature("`PeftMixedModel`", refused=Refusal(
    error=InvalidPlanError,
    match="would not quantize the base. Leave out mixed=True",
    reason="Its tuner knows nothing of quantization; several AutoQRA and LoRA adapters can be used without it.",
))  # fmt: skip
def mixed_model(case: ModelCase, _: Path) -> None:
    model = case.make()
    with unchanged_if_refused(model):
        get_peft_model(model, AutoQRAConfig(bits=3, r=4, target_modules=case.target_modules), mixed=True)


@feature("adapters of a batch by row: `adapter_names`", refused={"OPT": Refusal(
    error=ValueError,
    match="Length of `adapter_names` should be the same as the number of inputs",
    reason="OPT joins rows and tokens to one dimension; PEFT's own check.",
)})  # fmt: skip
def adapter_names(case: ModelCase, _: Path) -> None:
    model = trained(case)
    first = outputs(case, model)
    with model.disable_adapter():
        base = outputs(case, model)
    rows = outputs(case, model, adapter_names=["default", "__base__"])
    assert torch.allclose(rows[0], first[0], atol=1e-5)
    assert torch.allclose(rows[1], base[1], atol=1e-5)


@feature("`modules_to_save`")
def modules_to_save(case: ModelCase, tmp_path: Path) -> None:
    model = adapt(case, modules_to_save=[case.norm, *case.head])
    copies = [p for name, p in model.named_parameters() if ".modules_to_save." in name]
    with torch.no_grad():
        for parameter in copies:
            parameter.add_(0.5)
    assert copies
    assert all(parameter.requires_grad for parameter in copies)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.make(), tmp_path)
    assert torch.equal(outputs(case, again), outputs(case, model))


@feature("`modules_to_save` naming what is quantized", refused=Refusal(
    error=InvalidPlanError,
    match=r"modules_to_save names '[\w.]+', to be trained as a whole, and '[\w.]+' is quantized",
    reason="Quantized weights cannot be trained; keep the layer at 16 bits.",
))  # fmt: skip
def modules_to_save_quantized(case: ModelCase, _: Path) -> None:
    plan = planned(case, case.make())
    name = next(name for name, layer in plan.items() if layer.bits < 16)
    model = adapt(case, plan=plan)
    before = snapshot(model)
    with pytest.raises(InvalidPlanError, match="is quantized"):
        model.add_adapter("plain", LoraConfig(r=2, target_modules=list(adapter_layers(model)), modules_to_save=[name]))
    assert_unchanged(model, before)
    adapt(case, plan=plan, modules_to_save=[name.rpartition(".")[0]])


@feature("rsLoRA on and off")
def rank_stabilized(case: ModelCase, _: Path) -> None:
    for use_rslora in (True, False):
        model = adapt(case, lora_alpha=6, use_rslora=use_rslora)
        scalings = {layer.scaling["default"] for layer in adapter_layers(model).values()}
        assert scalings == {6 / (4**0.5 if use_rslora else 4)}


@feature("DoRA")
def dora(case: ModelCase, tmp_path: Path) -> None:
    model = trained(case, use_dora=True)
    before = outputs(case, model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.make(), tmp_path)
    assert torch.equal(outputs(case, again), before)
    model.train()
    loss(case, model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert_close(outputs(case, model), before, 5e-5)
    model.unmerge_adapter()
    assert torch.equal(outputs(case, model), before)


@feature("`lora_bias`")
def lora_bias(case: ModelCase, tmp_path: Path) -> None:
    warnings.filterwarnings(
        "ignore", "`lora_bias=True` was passed but", PeftWarning
    )  # layers without bias: no merging
    warnings.filterwarnings("ignore", r"Adapter 'default': \d+ LoRA tensor", PeftWarning)  # PEFT counts dimensions
    model = trained(case, lora_bias=True)
    assert all(layer.lora_B["default"].bias is not None for layer in adapter_layers(model).values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.make(), tmp_path)
    assert torch.equal(outputs(case, again), outputs(case, model))


@feature(
    "`target_parameters` beside quantized layers", only_for=["Mixtral"], otherwise="No fused parameters to adapt."
)
def target_parameters(case: ModelCase, tmp_path: Path) -> None:
    """PEFT nests one wrapper for each parameter of a module; both get gradients."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = trained(case, target_parameters=names)
    assert len(quantized_layers(model)) == 8
    loss(case, model.train()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.make(), tmp_path)
    assert torch.equal(outputs(case, again), outputs(case, model))


@feature("`target_parameters` naming a quantized weight", refused=Refusal(
    error=InvalidPlanError,
    match="the weight of a layer that is quantized",
    reason="A quantized layer has no weight parameter; name the layer in `target_modules`.",
))  # fmt: skip
def target_quantized_parameter(case: ModelCase, _: Path) -> None:
    name = next(iter(planned(case, case.make())))
    adapt(case, target_parameters=[f"{name}.weight"])


@feature("`exclude_modules`")
def exclude_modules(case: ModelCase, _: Path) -> None:
    excluded = next(iter(planned(case, case.make())))
    model = adapt(case, exclude_modules=[excluded])
    assert excluded not in adapter_layers(model)
    assert isinstance(model.get_base_model().get_submodule(excluded), nn.Module)
    assert not isinstance(model.get_base_model().get_submodule(excluded), QUANTIZED_LAYERS)


@feature("`layers_to_transform`")
def layers_to_transform(case: ModelCase, tmp_path: Path) -> None:
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in planned(case, case.make())})
    model = trained(case, target_modules=suffixes, layers_to_transform=[1])
    names = list(adapter_layers(model))
    assert names
    assert all(".1." in name for name in names)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.make(), tmp_path)
    assert list(adapter_layers(again)) == names
    assert torch.equal(outputs(case, again), outputs(case, model))


@feature("`layer_replication`", refused=Refusal(
    error=InvalidPlanError,
    match="layer_replication is not supported",
    reason="Copies of a layer share their weights, and a plan may give them different bits; replicate beforehand.",
))  # fmt: skip
def layer_replication(case: ModelCase, _: Path) -> None:
    adapt(case, layer_replication=[(0, 2), (1, 2)])


@feature("initializations that rewrite the base (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA, MiCA, KaSA)", refused=Refusal(
    error=InvalidPlanError,
    match="rewrites or needs the 16-bit base weights",
    reason="The base is quantized; `compensate` of a calibrated plan does what they are for.",
))  # fmt: skip
def rewriting_initializations(case: ModelCase, _: Path) -> None:
    for init in ("pissa", "olora", "loftq", "corda", "lora_ga", "mica"):
        with pytest.raises(InvalidPlanError, match="rewrites or needs"):
            adapt(case, init_lora_weights=init)
    with pytest.raises(InvalidPlanError, match="kasa_config truncates the base weights"):
        adapt(case, kasa_config=KasaConfig())
    model = adapt(case)
    targets = list(adapter_layers(model))
    with unchanged_if_refused(model):
        model.add_adapter("plain", LoraConfig(r=2, target_modules=targets, init_lora_weights="pissa"))


@feature("`low_cpu_mem_usage=True`")
def low_cpu_mem_usage(case: ModelCase, tmp_path: Path) -> None:
    model = trained(case, plan=planned(case, case.make()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.make(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(outputs(case, again), outputs(case, model))


@feature("`get_layer_status`, `get_model_status`")
def status(case: ModelCase, _: Path) -> None:
    model = adapt(case)
    layers = get_layer_status(model)
    assert {layer.name.removeprefix("model.") for layer in layers} >= adapter_layers(model).keys()
    assert all(layer.enabled and layer.active_adapters == ["default"] for layer in layers)
    found = get_model_status(model)
    assert found.enabled is True
    assert found.active_adapters == ["default"]
    assert (found.trainable_params, found.total_params) == model.get_nb_trainable_parameters()


@feature("`print_trainable_parameters` counts weights and not packed bytes")
def parameter_counts(case: ModelCase, _: Path) -> None:
    base = case.make()
    num_base = sum(parameter.numel() for parameter in base.parameters())
    model = adapt(case, base, plan=planned(case, base))
    added = [p.numel() for name, p in model.named_parameters() if "lora_" in name or ".modules_to_save." in name]
    assert model.get_nb_trainable_parameters() == (sum(added), num_base + sum(added))


@feature("`copy.deepcopy`")
def deep_copy(case: ModelCase, _: Path) -> None:
    model = trained(case, plan=planned(case, case.make()))
    expected = outputs(case, model)
    twin = copy.deepcopy(model)
    randomize_adapters(twin, 1)
    assert not torch.equal(outputs(case, twin), expected)
    assert torch.equal(outputs(case, model), expected)
    randomize_adapters(twin)
    assert torch.equal(outputs(case, twin), expected)


@feature("`torch.compile`: one graph a block")
def compiles(case: ModelCase, _: Path) -> None:
    """That a trainer compiles a whole model is shown in tests/tuner."""
    warnings.filterwarnings("ignore", ".*should not be instantiated.*", DeprecationWarning)  # torch's own tracing
    model = trained(case, plan=planned(case, case.make()))
    expected = outputs(case, model)
    first = next(iter(adapter_layers(model)))
    name = first[: first.index(".0.") + 2]
    block = model.get_base_model().get_submodule(name)
    block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    assert_close(outputs(case, model), expected)
    torch.compiler.reset()


@feature("quantized while it is read: the same codes as in place")
def streaming(case: ModelCase, tmp_path: Path) -> None:
    case.make().save_pretrained(tmp_path)
    plan = planned(case, case.make())
    streamed = case.auto_class.from_pretrained(tmp_path, quantization_config=AutoQRAQuantConfig(plan=plan))
    in_place = trained(case, plan=plan)
    model = trained(case, streamed, plan=plan)
    assert torch.equal(outputs(case, model), outputs(case, in_place))


@feature("memory as estimated, to the byte")
def memory(case: ModelCase, _: Path) -> None:
    base = case.make()
    plan = planned(case, base)
    estimate = MemoryModel.from_model(base, target_modules=case.target_modules).estimate(plan)
    measured = measure_memory(adapt(case, base, plan=plan), plan)
    for part in ("weight_bytes", "metadata_bytes", "untouched_bytes", "adapter_bytes"):
        heads = 0 if part != "untouched_bytes" else sum(
            p.numel() * 4 for name, p in adapt(case).named_parameters() if ".modules_to_save." in name
        )  # fmt: skip
        assert getattr(measured, part) == getattr(estimate, part) + heads, part


@feature("a plan for another model", refused=Refusal(
    error=PlanMismatchError, match="modules that the model does not have", reason="It names other layers.",
))  # fmt: skip
def plan_of_another_model(case: ModelCase, _: Path) -> None:
    adapt(case, plan=BitRankPlan({"model.layers.7.mlp.c_fc": LayerPlan(4, 4)}))
