"""``autoqra push``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peft_autoqra.commands.folder_parsers import push_parser
from peft_autoqra.commands.outcome import Outcome
from peft_autoqra.commands.tables import text_table
from peft_autoqra.hub import SharedFolder, prepare_folder, push_folder
from peft_autoqra.hub_repository import PushTarget


def run(argv: Sequence[str]) -> Outcome:
    """Complete the model card, check, list and upload, with ``--dry_run`` all but the last.

    Raises:
        AutoQRAError: there is nothing whole to share, or the hub refuses or cannot be reached.
    """
    options = push_parser().parse_args(argv)
    target = PushTarget(
        repo_id=options.repo_id,
        revision=options.revision,
        private=True if options.private else None,
        token=options.token,
        create_pr=options.create_pr,
    )
    shared = prepare_folder(options.folder)
    for warning in shared.warnings:
        print(f"autoqra push: warning: {warning}", file=sys.stderr)  # noqa: T201
    figures = {
        "dry_run": options.dry_run,
        "repo_id": options.repo_id,
        "kinds": list(shared.kinds),
        "file_bytes": shared.file_bytes,
        "left_out": list(shared.left_out),
        "warnings": list(shared.warnings),
    }
    if options.dry_run:
        text = f"{_listing(shared)}\nNothing was uploaded to {options.repo_id}: dry run."
        return Outcome(text, {**figures, "commit_url": None, "pr_url": None})
    commit = push_folder(shared, target, options.commit_message)
    urls = {"commit_url": str(commit.commit_url), "pr_url": commit.pr_url}
    return Outcome(f"{_listing(shared)}\n{commit.pr_url or commit.commit_url}", figures | urls)


def _listing(shared: SharedFolder) -> str:
    sizes = shared.file_bytes
    rows = [[name, f"{num_bytes:,}"] for name, num_bytes in sizes.items()]
    lines = [text_table([" and ".join(shared.kinds), "bytes"], [*rows, ["total", f"{sum(sizes.values()):,}"]])]
    if shared.left_out:
        lines.append(f"left out: {', '.join(shared.left_out)}")
    return "\n".join(lines)
