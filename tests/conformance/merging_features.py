"""Combining, merging and swapping adapters, row by row."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter

from peft_autoqra import (
    AutoQRAConfig,
    LayerPlan,
)
from peft_autoqra.errors import InvalidPlanError
from tests.conformance.building import (
    adapt,
    adapter_layers,
    assert_close,
    outputs,
    planned,
    quantized_layers,
    trained,
    unchanged_if_refused,
)
from tests.conformance.feature import FeatureGroup, Refusal
from tests.conformance.models import ModelCase
from tests.tuner.synthetic import assert_unchanged, randomize_adapters, snapshot

GROUP = FeatureGroup("Combining, merging, swapping")
feature = GROUP.feature


@feature("`add_weighted_adapter`: cat, svd, linear; saved and reloaded", refused={"Llama classifier": Refusal(
    error=ValueError,
    match="Cannot add weighted adapters if they target the same module with modules_to_save",
    reason="PEFT cannot combine the heads in `modules_to_save`.",
)})  # fmt: skip
def weighted_adapter(case: ModelCase, tmp_path: Path) -> None:
    plan = planned(case, case.make())
    model = adapt(case, plan=plan)
    model.add_adapter("second", AutoQRAConfig(plan=plan, task_type=case.task_type))
    for seed, name in enumerate(("default", "second")):
        randomize_adapters(model, seed, name)
    for kind in ("cat", "svd", "linear"):
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], kind, combination_type=kind, svd_rank=16)
        for layer in adapter_layers(model).values():
            parts = [layer.get_delta_weight(name) for name in ("default", "second")]
            if kind != "linear":  # PEFT adds A and B each, which is no sum of adapters
                assert torch.allclose(layer.get_delta_weight(kind), 0.7 * parts[0] + 0.3 * parts[1], atol=1e-5)
        model.set_adapter(kind)
        model.save_pretrained(tmp_path, selected_adapters=[kind])
        again = PeftModel.from_pretrained(case.make(), tmp_path / kind)
        assert torch.equal(outputs(case, again), outputs(case, model))


@feature("`disable_adapter` gives the quantized base")
def disable(case: ModelCase, _: Path) -> None:
    base = case.make()
    plan = planned(case, base)
    model = trained(case, base, plan=plan)
    adapted = outputs(case, model)
    with model.disable_adapter():
        disabled = outputs(case, model)
    assert torch.equal(outputs(case, model), adapted)
    assert torch.equal(outputs(case, model.unload()), disabled)


@feature("`merge_adapter`, and `unmerge_adapter` to the last bit")
def merge(case: ModelCase, _: Path) -> None:
    model = trained(case, plan=planned(case, case.make()))
    before, tensors = outputs(case, model), snapshot(model)
    model.merge_adapter()
    assert_close(outputs(case, model), before, 2e-5)
    model.unmerge_adapter()
    assert torch.equal(outputs(case, model), before)
    assert_unchanged(model, tensors)


@feature("other adapters and dtypes while one is merged")
def while_merged(case: ModelCase, tmp_path: Path) -> None:
    warnings.filterwarnings("ignore", "Adapter cannot be set when the model is merged", UserWarning)  # PEFT unmerges
    plan = planned(case, case.make())
    model = trained(case, plan=plan)
    model.save_pretrained(tmp_path)
    expected = outputs(case, model)
    model.merge_adapter()
    other = AutoQRAConfig(plan=dict.fromkeys(plan, LayerPlan(16, 2)), task_type=case.task_type)
    with pytest.raises(InvalidPlanError, match="is quantized to"):
        model.add_adapter("other", other)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(outputs(case, model), expected)
    model.merge_adapter()
    model.to(torch.float64).to(torch.float32)
    model.unmerge_adapter()
    assert_close(outputs(case, model), expected)


@feature("`merge_and_unload` to an ordinary model that saves and reloads")
def merge_and_unload(case: ModelCase, tmp_path: Path) -> None:
    model = trained(case, plan=planned(case, case.make()))
    before = outputs(case, model)
    merged = model.merge_and_unload()
    classes = {name: type(module) for name, module in merged.named_modules()}
    assert classes == {name: type(module) for name, module in case.make().named_modules()}
    after = outputs(case, merged)
    assert torch.allclose(after, before, atol=2e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(outputs(case, case.auto_class.from_pretrained(tmp_path)), after)


@feature("`unload` to the quantized base, saved and reloaded")
def unload(case: ModelCase, tmp_path: Path) -> None:
    model = trained(case, plan=planned(case, case.make()))
    base = model.unload()
    assert not adapter_layers(base)
    assert quantized_layers(base)
    base.save_pretrained(tmp_path)
    again = case.auto_class.from_pretrained(tmp_path)
    assert len(quantized_layers(again)) == len(quantized_layers(base))
    assert torch.equal(outputs(case, again), outputs(case, base))


@feature("`hotswap_adapter`", refused={"Llama classifier": Refusal(
    error=KeyError, match=r"score\.weight", reason="PEFT does not swap the head in `modules_to_save`.",
)})  # fmt: skip
def hotswap(case: ModelCase, tmp_path: Path) -> None:
    """There and back between adapters of other ranks and another alpha, saved and reloaded after each swap."""
    plan = planned(case, case.make())
    narrow = plan.replace(layers={n: LayerPlan(layer.bits, min(layer.rank, 2)) for n, layer in plan.items()})
    expected = {}
    for seed, (name, own, alpha) in enumerate((("wide", plan, 8), ("narrow", narrow, 5))):
        model = adapt(case, plan=own, lora_alpha=alpha)
        randomize_adapters(model, seed)
        model.save_pretrained(tmp_path / name)
        expected[name] = outputs(case, model)
    model = PeftModel.from_pretrained(case.make(), tmp_path / "wide")
    for name in ("narrow", "wide"):
        hotswap_adapter(model, tmp_path / name, adapter_name="default", torch_device="cpu")
        assert torch.equal(outputs(case, model), expected[name])
        model.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(case.make(), tmp_path / "again")
        assert torch.equal(outputs(case, again), expected[name])


@feature("`hotswap_adapter` to one of another base", refused=Refusal(
    error=ValueError, match="Configs are incompatible: for bits_pattern", reason="It was trained on other weights.",
))  # fmt: skip
def hotswap_other_base(case: ModelCase, tmp_path: Path) -> None:
    for bits in (3, 4):
        trained(case, bits=bits).save_pretrained(tmp_path / str(bits))
    model = PeftModel.from_pretrained(case.make(), tmp_path / "3")
    with unchanged_if_refused(model):
        hotswap_adapter(model, tmp_path / "4", adapter_name="default", torch_device="cpu")
