"""The configuration of a saved adapter of this package."""

from __future__ import annotations

from peft import PeftConfig

from peft_autoqra.errors import ExportError, InvalidPlanError
from peft_autoqra.hub_files import locate_file
from peft_autoqra.tuner.config import AutoQRAConfig

CONFIG_FILE = "adapter_config.json"


def read_adapter_config(adapter: str) -> AutoQRAConfig:
    """The configuration in a folder or hub repository.

    Args:
        adapter: folder or hub id.

    Raises:
        ExportError: no adapter there, or not one of this package.
        HubError: the repository does not exist, gives no access or cannot be reached.
        InvalidPlanError: the adapter is damaged.
    """
    if locate_file(CONFIG_FILE, adapter) is None:  # PEFT does not say what the hub answered
        raise ExportError(
            f"{adapter!r} holds no adapter: there is no {CONFIG_FILE}; give the folder or repository of a saved one."
        )
    try:
        config = PeftConfig.from_pretrained(adapter)
    except InvalidPlanError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{CONFIG_FILE} in {adapter!r} cannot be read ({error}); save or download the adapter again."
        ) from error
    if not isinstance(config, AutoQRAConfig):
        raise ExportError(
            f"The adapter in {adapter!r} was not made by peft_autoqra, so it has no quantized base; load it with "
            "PEFT, and merge it with merge_and_unload()."
        )
    return config
