"""``autoqra push``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_autoqra.commands.tables import text_table
from peft_autoqra.hub import SharedFolder, prepare_folder, push_folder
from peft_autoqra.hub_repository import PushTarget

DESCRIPTION = (
    "Upload a plan, an adapter or a quantized base to the Hugging Face Hub: the files that belong to it, checked "
    "first, in one commit."
)


def run(argv: Sequence[str]) -> int:
    """Complete the model card, check, list and upload, with ``--dry_run`` all but the last; returns the exit status.

    Raises:
        AutoQRAError: there is nothing whole to share, or the hub refuses or cannot be reached.
    """
    options = _parser().parse_args(argv)
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
    print(_listing(shared))  # noqa: T201
    if options.dry_run:
        print(f"Nothing was uploaded to {options.repo_id}: dry run.")  # noqa: T201
        return 0
    commit = push_folder(shared, target, options.commit_message)
    print(commit.pr_url or commit.commit_url)  # noqa: T201
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="autoqra push", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of a plan, an adapter or a quantized base")
    parser.add_argument("--repo_id", required=True, metavar="OWNER/NAME", help="repository; made where missing")
    parser.add_argument("--private", action="store_true", help="a repository that is made is seen by its owner only")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made where missing; the main branch by default")
    parser.add_argument("--commit_message", metavar="TEXT", help="what is uploaded by default")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--token", help="hub token; the one of `hf auth login`, or $HF_TOKEN, by default")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="complete the card, check and list; upload nothing",
    )
    return parser


def _listing(shared: SharedFolder) -> str:
    sizes = shared.file_bytes
    rows = [[name, f"{num_bytes:,}"] for name, num_bytes in sizes.items()]
    lines = [text_table([" and ".join(shared.kinds), "bytes"], [*rows, ["total", f"{sum(sizes.values()):,}"]])]
    if shared.left_out:
        lines.append(f"left out: {', '.join(shared.left_out)}")
    return "\n".join(lines)
