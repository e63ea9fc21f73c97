"""An adapter_config.json that is damaged, or written to do harm."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, get_peft_model

from peft_autoqra.errors import InvalidPlanError
from peft_autoqra.plan import BitRankPlan, LayerPlan
from peft_autoqra.tuner.config import AutoQRAConfig
from tests.conftest import TinyLlamaFactory
from tests.tuner.synthetic import assert_unchanged, snapshot

PLAN = BitRankPlan({"a.q_proj": LayerPlan(3, 4), "b": LayerPlan(16, 2)})
pytestmark = pytest.mark.timeout(30)


def write(folder: Path, **changes: Any) -> None:
    AutoQRAConfig(plan=PLAN).save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"autoqra_version": 2}, "upgrade"),
        ({"autoqra_version": True}, "upgrade"),
        ({"autoqra_version": None}, "upgrade"),
        ({"plan": "someone/plan"}, "plan is 'someone/plan'"),
        ({"r": 4.5}, "r is 4.5"),
        ({"r": -1}, "rank=-1"),
        ({"r": 2**70}, "rank="),
        ({"r": True}, "r is True"),
        ({"bits": 5}, "bits=5"),
        ({"group_size": 0}, "group_size=0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1"),
        ({"lora_dropout": "x"}, "lora_dropout is 'x'"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"rank_pattern": ["a"]}, "rank_pattern is"),
        ({"rank_pattern": {"a": 0}}, "rank 0"),
        ({"rank_pattern": {"a": "4"}}, "rank='4'"),
        ({"alpha_pattern": {"a": float("inf")}}, "alpha_pattern is inf"),
        ({"bits_pattern": {"a": 7}}, "bits=7"),
        ({"bits_pattern": {"(a+)+$": 4}}, "bits_pattern .* of the file"),
        ({"target_modules": "(a+)+$"}, "target_modules .* of the file"),
        ({"target_modules": [1, 2]}, "target_modules is"),
        ({"target_modules": [["a"]]}, "target_modules is"),
        ({"exclude_modules": "(x*)*"}, "exclude_modules .* of the file"),
        ({"modules_to_save": "head"}, "modules_to_save is"),
        ({"layers_pattern": "{9}", "layers_to_transform": [0]}, "layers_pattern .* of the file"),
        ({"layers_to_transform": [True]}, "layers_to_transform is"),
        ({"layers_to_transform": [10**30]}, "layers_to_transform is"),
        ({"layers_to_transform": -1}, "layers_to_transform is -1"),
        ({"layers_to_transform": "0"}, "layers_to_transform is '0'"),
        ({"trainable_token_indices": "abc"}, "trainable_token_indices is 'abc'"),
        ({"trainable_token_indices": 3}, "trainable_token_indices is 3"),
        ({"trainable_token_indices": [-5]}, "trainable_token_indices is"),
        ({"trainable_token_indices": [1.5]}, "trainable_token_indices is"),
        ({"trainable_token_indices": [True]}, "trainable_token_indices is"),
        ({"trainable_token_indices": {"embed_tokens": "x"}}, "trainable_token_indices is"),
        ({"trainable_token_indices": {"embed_tokens": [2**70]}}, "trainable_token_indices is"),
        ({"trainable_token_indices": {str(name): [0] for name in range(129)}}, "trainable_token_indices is"),
        ({"target_parameters": "a.weight"}, "target_parameters is"),
        ({"target_parameters": [3]}, "target_parameters is"),
        ({"target_parameters": [f"a{index}" for index in range(1025)]}, "target_parameters is"),
        ({"modules_to_save": [""]}, r"modules_to_save is \[''\]"),
        ({"modules_to_save": [f"zz{index}" for index in range(129)]}, "modules_to_save lists 129 names"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"alpha_pattern": {"a": -1}}, "alpha_pattern is -1"),
        ({"use_rslora": "yes"}, "use_rslora is"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": {}}, "init_lora_weights is"),
        ({"bias": 3}, "bias is 3"),
        ({"task_type": "COOKING"}, "damaged"),
        ({"quant_backend": "hqq"}, "'hqq' is unknown"),
        ({"calibration_digest": 3}, "calibration_digest is 3"),
        ({"eva_config": {"rho": 0}}, "damaged|eva"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    write(tmp_path, **changes)
    for reader in (AutoQRAConfig, PeftConfig):
        with pytest.raises(InvalidPlanError, match=match):
            reader.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "3", "{", '{"a": ' + "[" * 5000 + "]" * 5000 + "}", "\0"])
def test_no_configuration_at_all(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(InvalidPlanError, match=r"adapter_config.json in .* is damaged"):
        AutoQRAConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("tokens", [[0, 5], {"embed_tokens": [3]}])
def test_indices_are_read(tmp_path: Path, tokens: Any) -> None:
    config = AutoQRAConfig(target_modules=["q_proj"], trainable_token_indices=tokens, layers_to_transform=[0, 3])
    config.save_pretrained(str(tmp_path))
    again = AutoQRAConfig.from_pretrained(str(tmp_path))
    assert (again.trainable_token_indices, again.layers_to_transform) == (tokens, [0, 3])


def test_patterns_by_hand_are_read(tmp_path: Path) -> None:
    config = AutoQRAConfig(target_modules=r".*\.(q|v)_proj", rank_pattern={"q_proj": 4}, bits_pattern={r"v.*": 3})
    config.save_pretrained(str(tmp_path))
    again = AutoQRAConfig.from_pretrained(str(tmp_path))
    assert (again.target_modules, again.rank_pattern, again.bits_pattern) == (
        config.target_modules,
        config.rank_pattern,
        config.bits_pattern,
    )


def test_the_model_stays_as_it_was(tiny_llama: TinyLlamaFactory, tmp_path: Path) -> None:
    """What only the model can tell is noticed before its first layer is swapped."""
    model = tiny_llama()
    before = snapshot(model)
    for changes in ({"target_modules": ["nowhere"]}, {"rank_pattern": {"a": 4}}, {"base_fingerprint": "0" * 32}):
        AutoQRAConfig(bits=3, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(InvalidPlanError):
            get_peft_model(model, PeftConfig.from_pretrained(str(tmp_path)))
        assert_unchanged(model, before)
