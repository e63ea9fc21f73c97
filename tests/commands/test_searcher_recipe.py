"""What a recipe decides about messages."""

from __future__ import annotations

import logging

import pytest
from trl import SFTConfig

from peft_autoqra.commands.searcher_recipe import log_from


@pytest.fixture(autouse=True)
def _as_before():
    logger = logging.getLogger("peft_autoqra")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize(("settings", "shown"), [({}, False), ({"log_level": "info"}, True)])
def test_log_level_of_the_recipe_shows_how_far_a_search_is(caplog, tmp_path, settings, shown):
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, **settings)
    log_from(args.get_process_log_level())
    logging.getLogger("peft_autoqra.progress_log").info("searching: 10%")
    logging.getLogger("another.package").info("noise")
    assert [record.message for record in caplog.records] == ["searching: 10%"] * shown
