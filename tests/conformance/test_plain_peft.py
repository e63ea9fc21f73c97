"""A process that has only PEFT reads the adapter of every model as plain LoRA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.building import adapter_layers, planned, trained
from tests.conformance.models import CASES

READER = """
import json, sys, warnings
sys.modules["peft_autoqra"] = None  # importing it fails
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
import transformers

folder, names = sys.argv[1], json.loads(sys.argv[2])
found = {}
for name, auto_class in names.items():
    base = getattr(transformers, auto_class).from_pretrained(f"{folder}/{name}/base")
    model = PeftModel.from_pretrained(base, f"{folder}/{name}/adapter")
    assert type(model.peft_config["default"]).__name__ == "LoraConfig"
    layers = {key: m for key, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    found[name] = {
        key: [m.r["default"], m.scaling["default"], float(m.lora_B["default"].weight.detach().double().sum())]
        for key, m in layers.items()
    }
print(json.dumps(found))
"""


@pytest.mark.filterwarnings("ignore:The experts that the model keeps in fused parameters:UserWarning")
def test_ranks_scalings_and_values(tmp_path: Path) -> None:
    expected = {}
    for case in CASES:
        case.make().save_pretrained(tmp_path / case.name / "base")
        model = trained(case, plan=planned(case, case.make()))
        model.save_pretrained(tmp_path / case.name / "adapter")
        expected[case.name] = {
            name: [
                layer.r["default"],
                layer.scaling["default"],
                float(layer.lora_B["default"].weight.detach().double().sum()),
            ]
            for name, layer in adapter_layers(model).items()
        }
        assert len({rank for rank, *_ in expected[case.name].values()}) > 1
    names = json.dumps({case.name: case.auto_class.__name__ for case in CASES})
    command = [sys.executable, "-W", "ignore", "-c", READER, str(tmp_path), names]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert json.loads(completed.stdout) == expected
