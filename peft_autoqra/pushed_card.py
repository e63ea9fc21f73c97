"""Model cards of what ``push_to_hub`` of transformers and PEFT uploads: they write a card of their own over ours."""

from __future__ import annotations

import warnings
from functools import wraps
from pathlib import Path
from typing import Any

from transformers.utils.hub import PushToHubMixin

from peft_autoqra.folder_card import write_model_card


def register() -> None:
    """Write our part of the card between saving and uploading; calling it again changes nothing."""
    if not hasattr(PushToHubMixin._upload_modified_files, "__wrapped__"):
        PushToHubMixin._upload_modified_files = _with_card(PushToHubMixin._upload_modified_files)


def _with_card(original: Any) -> Any:
    @wraps(original)
    def _upload_modified_files(self: Any, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        try:
            write_model_card(Path(working_dir))
        except Exception as error:  # whatever it is: what is pushed may be somebody else's
            warnings.warn(f"The model card will say nothing of the plan: {error}", stacklevel=2)
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files
