"""Logits of exported models in a process that cannot import this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.tuner.synthetic import TOKENS

_SCRIPT = """
import json, sys
sys.modules["peft_autoqra"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
inputs, folders = json.loads(sys.argv[1]), json.loads(sys.argv[2])
outputs = []
for model_folder, adapter_folder in folders:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    if adapter_folder is not None:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter_folder)
    with torch.no_grad():
        outputs.append(model.eval()(input_ids=torch.tensor(inputs)).logits)
torch.save(outputs, sys.argv[3])
"""


def logits_elsewhere(folders: list[tuple[Path, Path | None]], scratch: Path) -> list[Tensor]:
    """Logits on the fixed tokens.

    Args:
        folders: pairs of a model and an adapter for it, or None.
        scratch: an existing folder.
    """
    pairs = [(str(model), None if adapter is None else str(adapter)) for model, adapter in folders]
    arguments = [json.dumps(TOKENS.tolist()), json.dumps(pairs), str(scratch / "logits.pt")]
    command = [sys.executable, "-W", "error::UserWarning", "-c", _SCRIPT, *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch, timeout=120)
    assert completed.returncode == 0, completed.stderr[-2000:]
    return list(torch.load(scratch / "logits.pt"))
