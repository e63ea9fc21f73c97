"""Tensor types for llama-quantize, by the names, types and block sizes of the gguf package."""

from __future__ import annotations

import json
import re
import shlex
import sys

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    XGLMConfig,
)

from peft_autoqra import BitRankPlan, LayerPlan
from peft_autoqra.errors import ExportError, MissingDependencyError, PlanMismatchError
from peft_autoqra.export.gguf_recipe import GGUFRecipe, export_gguf_recipe, gguf_recipe
from peft_autoqra.plan import BaseModelInfo
from peft_autoqra.plan_file import ADAPTER_FILE
from tests.export.models import train
from tests.tuner.synthetic import mixed_plan

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def empty(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def planned(model: torch.nn.Module) -> BitRankPlan:
    """Every bit-width, without the fingerprint that a model on the meta device cannot have."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    layers = {name: LayerPlan((2, 3, 4, 8, 16)[index % 5], 4) for index, name in enumerate(linears)}
    return BitRankPlan(layers, shapes={name: tuple(layer.weight.shape) for name, layer in linears.items()})


def choose(text: str, tensor_name: str) -> str:
    """llama-quantize's rule: words of a file, the expression before "=", searched, case folded; the first one wins."""
    for word in text.split():
        pattern, type_name = word.split("=")
        if re.search(pattern.lower(), tensor_name):
            return type_name
    raise AssertionError(tensor_name)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (LlamaConfig(**SIZES), "llama"),
        (MistralConfig(**SIZES), "llama"),
        (Qwen2Config(**SIZES), "qwen2"),
        (Qwen3Config(**SIZES, head_dim=64), "qwen3"),
        (Gemma3TextConfig(**SIZES, head_dim=64), "gemma3"),
        (Phi3Config(**SIZES), "phi3"),
        (FalconConfig(**SIZES), "falcon"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_every_tensor_gets_what_was_planned(config, architecture):
    """All tensors that GGUF's architecture can have are asked: layers 1 and 11 must not be confused."""
    model = empty(config)
    plan = planned(model)
    recipe = gguf_recipe(plan, model)
    assert recipe.architecture == architecture
    assert [tensor.module_name for tensor in recipe.tensors] == list(plan)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    mapping = gguf.get_tensor_name_map(arch, 12)
    possible = {f"{tensor_name}.weight" for _, tensor_name in mapping.mapping.values()}
    text = recipe.tensor_types()
    wanted = {tensor.tensor_name: tensor.type_name for tensor in recipe.tensors}
    assert wanted.keys() <= possible
    for name in possible:
        assert choose(text, name) == wanted.get(name, "F16"), name
    for line in text.splitlines()[:-1]:
        assert sum(bool(re.search(line.split("=")[0], name)) for name in possible) == 1


def test_types_have_about_the_planned_bits():
    model = empty(LlamaConfig(**SIZES))
    plan = planned(model)
    recipe = gguf_recipe(plan, model)
    bits = {2: 2.625, 3: 3.4375, 4: 4.5, 8: 8.5, 16: 16}  # llama.cpp's own figures for its types
    assert {t.type_name for t in recipe.tensors} == {"Q2_K", "Q3_K", "Q4_K", "Q8_0", "F16"}
    for tensor in recipe.tensors:
        assert 8 * tensor.num_bytes / tensor.num_weights == bits[plan[tensor.module_name].bits]
    sizes = [(t.num_weights, bits[plan[t.module_name].bits]) for t in recipe.tensors]
    assert recipe.bits_per_weight == pytest.approx(sum(n * b for n, b in sizes) / sum(n for n, _ in sizes))


@pytest.mark.parametrize(
    ("hidden_size", "bits", "type_name", "bits_per_weight"),
    [
        (256, 2, "Q2_K", 2.625),
        (288, 2, "IQ4_NL", 4.5),
        (288, 3, "IQ4_NL", 4.5),
        (288, 4, "IQ4_NL", 4.5),
        (288, 8, "Q8_0", 8.5),
        (280, 4, "F16", 16),
        (280, 8, "F16", 16),
    ],
)
def test_rows_that_blocks_do_not_divide(hidden_size, bits, type_name, bits_per_weight):
    model = empty(LlamaConfig(**SIZES | {"hidden_size": hidden_size, "num_hidden_layers": 1}))
    recipe = gguf_recipe(BitRankPlan({"model.layers.0.mlp.up_proj": LayerPlan(bits, 4)}), model)
    (tensor,) = recipe.tensors
    assert (tensor.type_name, 8 * tensor.num_bytes / tensor.num_weights) == (type_name, bits_per_weight)
    planned_type = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 8: "Q8_0"}[bits]
    block = 32 if type_name == "F16" else 256
    why = f"from {planned_type} to {type_name}, since rows of {hidden_size} weights are not divisible by {block}"
    fell_back = f" Tensors that fall back to another type: 1 (1 {why})."
    assert recipe.summary().partition("bytes).")[2] == (fell_back if type_name != planned_type else "")


def test_tensors_that_fall_back_are_counted_by_reason():
    """Down projections have rows of 512 weights, which blocks divide, the others of 288."""
    model = empty(LlamaConfig(**SIZES | {"hidden_size": 288, "num_hidden_layers": 2}))
    bits = {"gate_proj": 2, "up_proj": 3, "down_proj": 2}
    plan = BitRankPlan({f"model.layers.{i}.mlp.{name}": LayerPlan(b, 4) for i in range(2) for name, b in bits.items()})
    assert gguf_recipe(plan, model).summary().partition("bytes). ")[2] == (
        "Tensors that fall back to another type: 4 "
        "(2 from Q2_K to IQ4_NL, since rows of 288 weights are not divisible by 256; "
        "2 from Q3_K to IQ4_NL, since rows of 288 weights are not divisible by 256)."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_quantized_tensors(dtype, tied):
    """Quantized by the gguf package; for K-quants, which it cannot make, of the shapes that it gives."""
    settings = {"num_hidden_layers": 1, "tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | settings), dtype=dtype)
    recipe = gguf_recipe(planned(model), model)
    types = {tensor.module_name: tensor.type_name for tensor in recipe.tensors}
    num_bytes = 0
    quantized = set()
    for name, parameter in model.named_parameters():
        data = parameter.detach().float().numpy()
        default = "F32" if data.ndim == 1 else recipe.remaining_type
        qtype = gguf.GGMLQuantizationType[types.get(name.removesuffix(".weight"), default)]
        try:
            num_bytes += gguf.quants.quantize(data, qtype).nbytes
            quantized.add(qtype.name)
        except NotImplementedError:
            num_bytes += int(np.prod(gguf.quant_shape_to_byte_shape(data.shape, qtype)))
    assert recipe.num_bytes == num_bytes
    assert quantized == {"F32", "Q8_0", "BF16" if dtype == torch.bfloat16 else "F16"}
    assert f"({num_bytes:,} bytes)" in recipe.summary()


def recipe_of(bits: list[int]) -> GGUFRecipe:
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(len(bits))]
    plan = BitRankPlan({name: LayerPlan(b, 4) for name, b in zip(names, bits, strict=True)})
    return gguf_recipe(plan, empty(LlamaConfig(**SIZES), torch.bfloat16))


@pytest.mark.parametrize(
    ("bits", "file_type"),
    [([3, 3, 2], "Q3_K_M"), ([4, 16, 16], "Q4_K_M"), ([8], "Q8_0"), ([2], "Q2_K"), ([16], "BF16")],
)
def test_the_command_names_the_commonest_type(bits, file_type):
    command = recipe_of(bits).commands("/of the/recipe").splitlines()[1]
    program, flag, path, *rest = shlex.split(command)
    assert (program, flag, path) == ("llama-quantize", "--tensor-type-file", "/of the/recipe/tensor_types.txt")
    assert rest == ["model-BF16.gguf", "model-mixed.gguf", file_type]


def test_a_plan_in_a_folder(tiny_llama, tmp_path):
    """Only the configuration of the base is read."""
    model = tiny_llama(hidden_size=256, intermediate_size=512)
    model.config.save_pretrained(tmp_path / "base")
    plan = mixed_plan(model, base_model=BaseModelInfo(name_or_path=str(tmp_path / "base")))
    plan.save_pretrained(tmp_path / "plan")
    recipe = export_gguf_recipe(tmp_path / "plan", tmp_path / "out")
    assert (tmp_path / "out" / "tensor_types.txt").read_text() == recipe.tensor_types()
    assert recipe.tensors == gguf_recipe(plan, model).tensors
    readme = (tmp_path / "out" / "README.md").read_text()
    assert recipe.commands("THIS_FOLDER") in readme
    assert "about the planned bits" in readme
    assert recipe.summary() in readme


def test_the_base_that_only_the_adapter_names(tiny_llama, tmp_path, monkeypatch):
    """At the revision that it names, too; a plan made for no model in particular names none."""
    trained = train(tiny_llama(), tmp_path, bits=4, r=2)
    path = trained.adapter / ADAPTER_FILE
    with safe_open(path, framework="pt") as file:
        plan = BitRankPlan.from_metadata(file.metadata(), "adapter").replace(base_model=BaseModelInfo())
    save_file(load_file(path), path, metadata=plan.to_metadata())
    assert BitRankPlan.from_pretrained(trained.adapter).base_model.name_or_path is None
    repository = tmp_path / "cache" / "models--someone--tiny"
    (repository / "snapshots").mkdir(parents=True)
    trained.base.rename(repository / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = trained.adapter / "adapter_config.json"
    named = {"base_model_name_or_path": "someone/tiny", "revision": "v1"}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    with pytest.raises(ExportError, match="'someone/tiny' cannot be loaded"):
        export_gguf_recipe(trained.adapter, tmp_path / "out")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("abc")
    assert len(export_gguf_recipe(trained.adapter, tmp_path / "out").tensors) == len(plan)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ExportError, match="give --model_name_or_path"):
        export_gguf_recipe(trained.adapter, tmp_path / "out")


# --------------------------------------------------------------------------------------------------------- refusals
def test_unknown_architectures_are_refused_with_those_that_are_known():
    config = XGLMConfig(vocab_size=64, d_model=32, ffn_dim=64, num_layers=1, attention_heads=2)
    with pytest.raises(ExportError, match=r"of type 'xglm'; it knows afmoe, .*llama, .*qwen3"):
        gguf_recipe(BitRankPlan({"model.layers.0.fc1": LayerPlan(4, 4)}), empty(config))


def test_modules_without_a_tensor_of_their_own_are_refused():
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    model = empty(config)
    plan = BitRankPlan({"backbone.layers.0.mixer": LayerPlan(4, 4)})
    with pytest.raises(ExportError, match=r"'backbone.layers.0.mixer' has no tensor of its own.*'mamba'"):
        gguf_recipe(plan, model)


def test_a_plan_for_another_model():
    model = empty(LlamaConfig(**SIZES))
    with pytest.raises(PlanMismatchError, match="1 modules that the model does not have, such as 'lin'"):
        gguf_recipe(BitRankPlan({"lin": LayerPlan(4, 4)}), model)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(PlanMismatchError, match="shape"):
        gguf_recipe(BitRankPlan({name: LayerPlan(4, 4)}, shapes={name: (8, 8)}), model)


def test_no_base_named_or_none_there(tmp_path):
    plan = BitRankPlan({"model.layers.0.mlp.up_proj": LayerPlan(4, 4)})
    plan.save_pretrained(tmp_path / "plan")
    with pytest.raises(ExportError, match="give --model_name_or_path"):
        export_gguf_recipe(tmp_path / "plan", tmp_path / "out")
    with pytest.raises(ExportError, match="cannot be loaded"):
        export_gguf_recipe(tmp_path / "plan", tmp_path / "out", model_name_or_path=str(tmp_path / "nothing"))
    assert not (tmp_path / "out").exists()


def test_without_gguf(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'peft-autoqra\[gguf\]'"):
        recipe_of([4])


def test_convolutional_layers_have_their_sizes_the_other_way_round():
    config = GPT2Config(n_embd=256, n_layer=1, n_head=2, vocab_size=64)
    plan = BitRankPlan({"transformer.h.0.mlp.c_fc": LayerPlan(4, 4)}, shapes={"transformer.h.0.mlp.c_fc": (1024, 256)})
    (tensor,) = gguf_recipe(plan, empty(config)).tensors
    assert (tensor.tensor_name, tensor.type_name) == ("blk.0.ffn_up.weight", "Q4_K")
