"""A bar for the terminal."""

from __future__ import annotations

from tqdm.auto import tqdm

from peft_autoqra.search_callback import SearchCallback, SearchProgress
from peft_autoqra.search_result import SearchResult
from peft_autoqra.trial import Trial


class ProgressBar(SearchCallback):
    """Counts trials."""

    def __init__(self) -> None:
        """The bar appears when the search begins."""
        self._bar: tqdm | None = None

    def on_search_begin(self, progress: SearchProgress) -> None:
        """Draw it."""
        self._bar = tqdm(desc="search", unit="trial", initial=progress.num_told)

    def on_trial_begin(self, trial: Trial, progress: SearchProgress) -> None:
        """Say what runs."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{trial.origin}, {trial.fidelity.num_steps} steps, cost {progress.cost:.2f}")

    def on_trial_end(self, trial: Trial, progress: SearchProgress) -> None:
        """One more."""
        if self._bar is not None:
            self._bar.update()

    def on_search_end(self, result: SearchResult | None, progress: SearchProgress) -> None:
        """Leave it as it is."""
        if self._bar is not None:
            self._bar.close()
