"""Lines for a log file, where no one watches a terminal."""

from __future__ import annotations

import logging
import time

from peft_autoqra.progress_text import progress_text
from peft_autoqra.search_callback import SearchCallback, SearchProgress
from peft_autoqra.search_pace import SearchPace
from peft_autoqra.search_result import SearchResult
from peft_autoqra.trial import Trial

LOG_SECONDS = 600.0
"""Between two lines of one stage, at least."""

logger = logging.getLogger(__name__)


class ProgressLog(SearchCallback):
    """Logs at level INFO how far a search is: at its beginning and end, at every new stage, every ten minutes."""

    def __init__(self) -> None:
        """Nothing is logged yet."""
        self._pace = SearchPace()
        self._stage = ""
        self._last = 0.0

    def on_search_begin(self, progress: SearchProgress) -> None:
        """One line."""
        self._log("searching", progress)

    def on_trial_begin(self, trial: Trial, progress: SearchProgress) -> None:
        """One line where a stage begins."""
        stage = trial.origin.split(":")[0]
        if stage != self._stage:
            self._stage = stage
            self._log(stage, progress)

    def on_trial_end(self, trial: Trial, progress: SearchProgress) -> None:
        """One line now and then."""
        self._pace.trial_ended(progress)
        if time.monotonic() - self._last > LOG_SECONDS:
            self._log(self._stage, progress)

    def on_search_end(self, result: SearchResult | None, progress: SearchProgress) -> None:
        """What came out."""
        self._log("search stopped" if result is None else "search done", progress)
        if result is not None:
            logger.info(result.verdict)

    def _log(self, what: str, progress: SearchProgress) -> None:
        self._last = time.monotonic()
        share = f"cost {progress.ended_cost:.2f} of {progress.max_cost:g}"
        logger.info("%s: %.0f%%, %s, %s", what, 100 * progress.fraction, share, progress_text(progress, self._pace))
