"""Where a run took place."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("peft-autoqra", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")


def describe_environment() -> dict[str, Any]:
    """Versions, device, threads, date and commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


@cache
def _commit() -> str:
    """Of the checkout; empty outside of one."""
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


@cache
def _device() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    names = [line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor()
