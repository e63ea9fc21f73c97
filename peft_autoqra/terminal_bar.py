"""Progress bars, quiet where huggingface_hub's are."""

from __future__ import annotations

from typing import Any

from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]


def terminal_bar(*args: Any, show: bool = True, **kwargs: Any) -> Any:
    """A tqdm bar on a terminal or in a notebook; nothing where standard error is a file or a pipe.

    Nothing, too, where ``HF_HUB_DISABLE_PROGRESS_BARS`` is set, or bars are switched off for huggingface_hub,
    ``transformers.utils.logging`` or ``huggingface_hub.utils.disable_progress_bars("peft_autoqra")``.

    Args:
        *args: as of tqdm.
        show: False draws nothing in any case.
        **kwargs: as of tqdm.
    """
    return tqdm(*args, disable=None if show else True, name="peft_autoqra", **kwargs)  # type: ignore[no-untyped-call]
