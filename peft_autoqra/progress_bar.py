"""A bar for terminals and notebooks."""

from __future__ import annotations

from threading import Event, Thread
from typing import Any

from peft_autoqra.progress_text import progress_text
from peft_autoqra.search_callback import SearchCallback, SearchProgress
from peft_autoqra.search_pace import SearchPace
from peft_autoqra.search_result import SearchResult
from peft_autoqra.terminal_bar import terminal_bar
from peft_autoqra.trial import Trial

_TICK_SECONDS = 1.0


class ProgressBar(SearchCallback):
    """Shows how much of its limits a search has used up, the time left, and the best loss beside the baseline's.

    The share is of cost and not of trials, whose number is not known beforehand. Quiet where standard error is no
    terminal, and where progress bars are switched off for transformers or huggingface_hub.
    """

    def __init__(self) -> None:
        """The bar appears when the search begins."""
        self._pace = SearchPace()
        self._bar: Any = None
        self._is_over = Event()
        self._clock: Thread | None = None

    def on_search_begin(self, progress: SearchProgress) -> None:
        """Draw it."""
        self._bar = terminal_bar(
            desc="searching",
            total=1.0,
            initial=progress.fraction,
            bar_format="{l_bar}{bar}| {elapsed}{postfix}",
            dynamic_ncols=True,
        )
        self._bar.set_postfix_str(progress_text(progress, self._pace))
        self._is_over.clear()
        if not self._bar.disable:  # trials take minutes, and time has to be seen to go by
            self._clock = Thread(target=self._tick, args=(self._bar,), name="progress-bar", daemon=True)
            self._clock.start()

    def on_trial_begin(self, trial: Trial, progress: SearchProgress) -> None:
        """Another one runs."""
        self._show(progress)

    def on_trial_end(self, trial: Trial, progress: SearchProgress) -> None:
        """Move on."""
        self._pace.trial_ended(progress)
        self._show(progress)

    def on_search_end(self, result: SearchResult | None, progress: SearchProgress) -> None:
        """Fill it where the search is done; what is left of the budget did not suffice for one more trial."""
        if self._bar is None:
            return
        self._is_over.set()
        if self._clock is not None:
            self._clock.join()
        if result is not None:
            self._bar.n = self._bar.total
            self._bar.set_postfix_str(progress_text(progress, None))
        self._bar.close()
        self._bar = self._clock = None

    def _show(self, progress: SearchProgress) -> None:
        if self._bar is not None:
            self._bar.n = max(self._bar.n, progress.fraction)
            self._bar.set_postfix_str(progress_text(progress, self._pace))

    def _tick(self, bar: Any) -> None:
        while not self._is_over.wait(_TICK_SECONDS):
            bar.refresh()
