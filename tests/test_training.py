"""The fine-tune that ``autoqra train`` and scripts/finetune.py share."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from peft_autoqra import (
    AutoQRAConfig,
    AutoQRAQuantConfig,
    BaseModelInfo,
    BitRankPlan,
    LayerPlan,
    QuantizerSettings,
    calibrate_plan,
    uniform_plan,
)
from peft_autoqra.commands import train as train_command
from peft_autoqra.errors import CalibrationError, InvalidPlanError, PlanMismatchError, StorageError
from peft_autoqra.recipe import AdapterArguments, ModelArguments, RecipeError
from peft_autoqra.recipe_inputs import load_base_model
from peft_autoqra.training import FineTune, FineTuneInputs, TrainingDivergedError, TrainingMemoryError
from tests.full_disk import full_disk
from tests.tiny_data import token_dataset, word_tokenizer
from tests.tiny_folder import TinyFolder, make_tiny_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_llama) -> TinyFolder:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"), tiny_llama())


@pytest.fixture
def make_finetune(tiny_llama, tmp_path):
    def make(train: Dataset | None = None, recipe: dict | None = None, model=None, **adapter) -> FineTune:
        args = SFTConfig(
            **{
                "output_dir": str(tmp_path / "adapter"),
                "per_device_train_batch_size": 2,
                "per_device_eval_batch_size": 4,
                "max_steps": 3,
                "max_length": 16,
                "learning_rate": 1e-2,
                "bf16": False,
                "gradient_checkpointing": False,
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
            }
            | (recipe or {})
        )
        return FineTune(
            FineTuneInputs(
                model=tiny_llama() if model is None else model,
                processing_class=word_tokenizer(),
                train_dataset=token_dataset(seed=0) if train is None else train,
                eval_dataset=token_dataset(seed=1),
                args=args,
                adapter=AdapterArguments(**({"num_calibration_sequences": 4} | adapter)),
            )
        )

    return make


@pytest.mark.parametrize(
    "adapter",
    [
        {"bits": 3, "r": 4},
        {"bits": 2, "r": 4, "num_calibration_sequences": 0},
        {"bits": 3, "r": 4, "quant_backend": "gptq"},
        {"bits": 16, "r": 2},
        {"quant_backend": "bitsandbytes", "r": 4},
        {"quant_backend": "bitsandbytes", "bits": 8, "r": 4},
        {"bits": 8, "r": 2, "target_modules": ["q_proj", "v_proj"]},
    ],
)
def test_measured_bytes_are_the_estimated_ones(make_finetune, adapter):
    result = make_finetune(**adapter).run()
    assert result.measured == result.estimated
    assert result.measured.gradient_bytes > 0


def test_trained_adapter_scores_the_same_after_a_reload(make_finetune, tiny_llama, tmp_path):
    finetune = make_finetune(bits=3, r=4)
    result = finetune.run()
    tokens = torch.arange(12)[None]
    trained = finetune.trainer.model.eval()(input_ids=tokens).logits
    assert json.loads((tmp_path / "adapter" / "finetune_result.json").read_text()) == result.to_dict()
    assert (tmp_path / "adapter" / "tokenizer.json").exists()
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert torch.equal(reloaded(input_ids=tokens).logits, trained)
    moments_only = finetune.plan.calibration.without_corrections()
    trained_plan = finetune.plan.replace(initialization="zero", calibration=moments_only)
    assert BitRankPlan.from_pretrained(tmp_path / "adapter") == trained_plan


def test_card_tells_the_measured_figures_and_keeps_them_when_trl_writes_its_card_anew(make_finetune, tmp_path):
    finetune = make_finetune(bits=3, r=4)
    result = finetune.run()
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert f"| held-out loss of this adapter | {result.eval_loss:.4f} after 3 steps" in text
    part = f"{result.measured.optimizer_bytes:,}"
    assert f"| optimizer states | {part} | {part} |" in text
    finetune.trainer.create_model_card()  # as a push does
    anew = (tmp_path / "adapter" / "README.md").read_text()
    assert "## Training procedure" in anew  # TRL's, but for what is wrong of a local base and without this package
    assert not any(wrong in anew for wrong in ("[None]", "licence: license", "Quick start", "pipeline("))
    assert anew.split("<!-- autoqra")[1] == text.split("<!-- autoqra")[1]


def test_training_lowers_the_loss(make_finetune):
    finetune = make_finetune(bits=4, r=8)
    before = finetune.trainer.evaluate()["eval_loss"]
    assert finetune.run().eval_loss < before


def test_uniform_native_plans_are_calibrated_unless_told_otherwise(make_finetune):
    assert make_finetune(bits=3, r=4).plan.initialization == "compensate"
    assert make_finetune(bits=3, r=4, num_calibration_sequences=0).plan.initialization == "zero"
    assert make_finetune(quant_backend="bitsandbytes").plan.initialization == "zero"


def test_adapters_of_uniform_plans_are_scaled_by_rank(make_finetune):
    layers = [m for m in make_finetune(bits=3, r=4).trainer.model.modules() if isinstance(m, LoraLayer)]
    assert layers
    assert {layer.scaling["default"] for layer in layers} == {8 * 16 / 4 / 2}


def test_plan_from_a_folder_decides(make_finetune, tiny_llama, tmp_path):
    plan = uniform_plan(tiny_llama(), 3, 2).replace(provenance={"lora_alpha": 4})
    plan.save_pretrained(tmp_path / "plan")
    finetune = make_finetune(plan=str(tmp_path / "plan"))
    config: AutoQRAConfig = finetune.trainer.model.peft_config["default"]
    assert (finetune.plan, config.r, config.lora_alpha) == (plan, 2, 4)
    finetune = make_finetune(plan=str(tmp_path / "plan"), lora_alpha=16)
    assert finetune.trainer.model.peft_config["default"].lora_alpha == 16


@pytest.mark.parametrize("backend", ["native", "gptq", "bitsandbytes"])
def test_a_base_that_is_quantized_while_it_is_read_trains_the_same(make_finetune, tiny, backend, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(tiny.model)
    names = list(uniform_plan(dense, 4, 4))
    choices = (4, 8, 16) if backend == "bitsandbytes" else (2, 3, 4, 8, 16)
    layers = {name: LayerPlan(choices[i % len(choices)], (4, 2, 0)[i % 3]) for i, name in enumerate(names)}
    plan = uniform_plan(dense, 4, 4, quantizer=QuantizerSettings(backend=backend, group_size=32)).replace(
        layers=layers
    )
    if backend != "bitsandbytes":
        batches = [{"input_ids": torch.tensor(token_dataset(seed=2)["input_ids"])}]
        plan = calibrate_plan(plan, dense, batches)
    plan.save_pretrained(tmp_path / "plan")

    def train(model) -> tuple[dict[str, torch.Tensor], dict]:
        finetune = make_finetune(model=model, plan=str(tmp_path / "plan"))
        result = finetune.run()
        assert result.measured == result.estimated
        tensors = {
            name: p.detach().clone() for name, p in finetune.trainer.model.named_parameters() if p.requires_grad
        }
        return tensors, result.measured.to_dict()

    expected, expected_memory = train(dense)
    model_args = ModelArguments(model_name_or_path=str(tiny.model))
    args = SFTConfig(output_dir=str(tmp_path / "adapter"), use_cpu=True, bf16=False)
    streamed = load_base_model(model_args, args, AutoQRAQuantConfig(plan=plan))
    assert streamed.is_quantized
    found, memory = train(streamed)
    assert memory == expected_memory
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_only_what_a_plan_decides_is_quantized_while_it_is_read(tiny, tmp_path, monkeypatch):
    uniform_plan(AutoModelForCausalLM.from_pretrained(tiny.model), 4, 4).save_pretrained(tmp_path / "plan")
    seen = []
    load = train_command.load_base_model
    monkeypatch.setattr(train_command, "load_base_model", lambda *args: seen.append(load(*args)) or seen[-1])
    plan = ["--plan", str(tmp_path / "plan")]
    uncalibrated = ["--num_calibration_sequences", "0"]
    for flags in (plan, [*plan, "--stream", "false"], uncalibrated):
        argv = [*tiny.flags, *flags, "--output_dir", str(tmp_path / "adapter"), "--dry_run"]
        assert train_command.run(argv).data["dry_run"]
    # in-place quantization leaves no note on a model that has adapters
    assert [getattr(model, "is_quantized", False) for model in seen] == [True, False, False]


def test_a_checkpoint_that_cannot_be_streamed_names_the_flag(tiny, tmp_path):
    plan = uniform_plan(AutoModelForCausalLM.from_pretrained(tiny.model), 4, 4)
    plan.save_pretrained(tmp_path / "plan")
    shutil.copytree(tiny.model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    argv = [*tiny.flags, "--model_name_or_path", str(tmp_path / "model"), "--plan", str(tmp_path / "plan")]
    with pytest.raises(RecipeError, match=r"up_proj.*--stream false"):
        train_command.run([*argv, "--output_dir", str(tmp_path / "adapter")])


def test_resuming_from_the_last_checkpoint(make_finetune, tmp_path):
    straight = make_finetune(bits=3, r=4, recipe={"save_steps": 2})
    straight.run()
    shutil.rmtree(tmp_path / "adapter" / "checkpoint-3")
    resumed = make_finetune(bits=3, r=4, recipe={"resume_from_checkpoint": "true", "save_steps": 2})
    resumed.run()
    for (name, found), (_, expected) in zip(
        resumed.trainer.model.named_parameters(), straight.trainer.model.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), name


def test_a_checkpoint_of_the_last_step_is_not_trained_further(make_finetune):
    """As after a kill between the last checkpoint and the end."""
    recipe = {"save_steps": 3, "gradient_accumulation_steps": 1}
    straight = make_finetune(bits=3, r=4, recipe=recipe)
    expected = straight.run()
    resumed = make_finetune(bits=3, r=4, recipe=recipe | {"resume_from_checkpoint": "true"})
    found = resumed.run()
    assert (found.num_steps, found.eval_loss) == (expected.num_steps, expected.eval_loss)
    assert (found.train_loss, found.measured) == (None, None)  # of no step
    assert "3 steps, all before this start, held-out loss" in train_command.result_text(resumed, found)
    trained = dict(straight.trainer.model.named_parameters())
    for name, parameter in resumed.trainer.model.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_estimate_changes_no_weight(make_finetune):
    finetune = make_finetune(bits=4, r=4)
    before = {name: p.detach().clone() for name, p in finetune.trainer.model.named_parameters()}
    estimate = finetune.estimate()
    assert estimate.num_steps == 3
    assert estimate.seconds > 0
    for name, parameter in finetune.trainer.model.named_parameters():
        assert torch.equal(before[name], parameter)
        assert parameter.grad is None


def test_optimizer_whose_states_are_not_known(make_finetune):
    result = make_finetune(recipe={"optim": "adafactor"}, r=4).run()
    assert result.estimated is None
    assert result.measured.optimizer_bytes > 0


def test_packed_texts_are_calibrated_and_trained_on(make_finetune):
    finetune = make_finetune(recipe={"packing": True, "max_length": 32}, bits=3, r=4)
    assert finetune.plan.initialization == "compensate"
    assert finetune.run().eval_loss > 0


def test_diverged_run_leaves_an_earlier_adapter_alone(make_finetune, tmp_path):
    finetune = make_finetune(bits=16, r=4, recipe={"learning_rate": float("inf")})
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("earlier")
    with pytest.raises(TrainingDivergedError, match="learning_rate=inf"):
        finetune.run()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_text() == "earlier"
    assert not (tmp_path / "adapter" / "finetune_result.json").exists()


def test_unknown_plan_is_refused_before_the_data_is_touched(make_finetune, monkeypatch, tmp_path):
    monkeypatch.setattr("peft_autoqra.training.SFTData", None)
    with pytest.raises(InvalidPlanError, match="plam"):
        make_finetune(plan=str(tmp_path / "plam"))


def test_plan_of_another_model_is_refused(make_finetune, tmp_path):
    plan = BitRankPlan({"h.0.attn": LayerPlan(4, 4)}, base_model=BaseModelInfo(name_or_path="gpt2"))
    plan.save_pretrained(tmp_path / "plan")
    with pytest.raises(PlanMismatchError, match=r"h\.0\.attn.*gpt2"):
        make_finetune(plan=str(tmp_path / "plan"))


def test_bad_settings_are_refused(make_finetune):
    with pytest.raises(InvalidPlanError, match="bits=5"):
        make_finetune(bits=5)
    with pytest.raises(RecipeError, match="at least 0"):
        make_finetune(num_calibration_sequences=-1)
    with pytest.raises(RecipeError, match="gptq needs calibration"):
        make_finetune(num_calibration_sequences=0, quant_backend="gptq")
    with pytest.raises(CalibrationError, match="empty"):
        make_finetune(train=Dataset.from_dict({"input_ids": []}))


def test_an_earlier_adapter_survives_that_the_disk_is_full(make_finetune, tmp_path):
    earlier = make_finetune(bits=16, r=4, recipe={"save_strategy": "no"})
    earlier.run()
    names = ("adapter_model.safetensors", "adapter_config.json", "finetune_result.json")
    before = [(tmp_path / "adapter" / name).read_bytes() for name in names]
    other = make_finetune(bits=16, r=8, recipe={"save_strategy": "no"})
    with full_disk(2**14), pytest.raises(StorageError, match=r"adapter cannot be written \("):
        other.run()
    assert [(tmp_path / "adapter" / name).read_bytes() for name in names] == before
    assert not list((tmp_path / "adapter").glob("*.partial"))
    other.run()
    assert (tmp_path / "adapter" / names[0]).read_bytes() != before[0]


def test_a_checkpoint_that_does_not_fit_is_named(make_finetune, tmp_path):
    finetune = make_finetune(bits=16, r=4, recipe={"save_steps": 2})
    with full_disk(2**16), pytest.raises(StorageError, match=r"checkpoint-2 cannot be written \(.*free disk space"):
        finetune.run()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("heap"), RuntimeError("can't allocate memory: x")],
)
def test_lack_of_memory_names_what_helps(make_finetune, error):
    finetune = make_finetune(bits=16, r=4)

    def fail(*_):
        raise error

    finetune.trainer.model.get_base_model().model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(
        TrainingMemoryError, match=r"Out of memory \(.*lower per_device_train_batch_size=2 or max_length=16"
    ):
        finetune.run()
