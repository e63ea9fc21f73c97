"""Flags of the commands that take no recipe; nothing heavy is imported here, for the sake of help and completion."""

from __future__ import annotations

from pathlib import Path

from peft_autoqra.commands.command_parser import CommandParser

SHELLS = ("bash", "zsh", "fish", "tcsh")
COLORS = ("auto", "always", "never")
EXPORT_DTYPES = ("bfloat16", "float16", "float32")
EXPORT_OPTIONS = {
    "plain-lora": ("rank",),
    "merged": ("model_name_or_path", "dtype"),
    "base": ("model_name_or_path", "dtype"),
    "gguf": ("model_name_or_path",),
}
"""What may be exported, and the flags that go with it."""
_PLAN_HELP = (
    "Folder of a plan, an adapter or a quantized base, output_dir of a search, or hub id (REPO or REPO@REVISION)."
)


def show_parser() -> CommandParser:
    """Of ``autoqra show``."""
    parser = CommandParser(
        "show",
        usage="PLAN [--color WHEN] [--json]",
        description="Print a plan: bits and ranks as a heat map (layers down, module types across), bytes by part.",
    )
    parser.add_argument("plan", metavar="PLAN", help=_PLAN_HELP)
    _add_color(parser)
    return parser


def compare_parser() -> CommandParser:
    """Of ``autoqra compare``."""
    parser = CommandParser(
        "compare",
        usage="A B [--color WHEN] [--json]",
        description="Print what is different between two plans for one model: bytes by part, averages, modules.",
    )
    parser.add_argument("first", metavar="A", help=_PLAN_HELP)
    parser.add_argument("second", metavar="B", help="Likewise.")
    _add_color(parser)
    return parser


def _add_color(parser: CommandParser) -> None:
    parser.add_argument(
        "--color",
        choices=COLORS,
        default="auto",
        help="When to use colour; auto: in terminals, unless NO_COLOR is set. It reads the same without.",
    )


def completion_parser() -> CommandParser:
    """Of ``autoqra completion``."""
    parser = CommandParser(
        "completion",
        usage="{" + ",".join(SHELLS) + "}",
        description="Print a script that completes commands and flags.",
    )
    parser.add_argument("shell", choices=SHELLS, help="Shell that the script is for.")
    parser.epilog = "For bash: autoqra completion bash > ~/.local/share/bash-completion/completions/autoqra"
    return parser


def report_parser() -> CommandParser:
    """Of ``autoqra report``."""
    parser = CommandParser(
        "report",
        usage="DIR [--output PATH] [--json]",
        description="Write one HTML page about a search (or about a plan alone), and beside it a folder with its "
        "figures as PNG and its tables as CSV.",
    )
    parser.add_argument(
        "directory",
        metavar="DIR",
        type=Path,
        help="output_dir of a search, finished or under way, or folder of a plan.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="The page, or a folder for it; by default DIR/report.html, with DIR/report/ beside it.",
    )
    return parser


def push_parser() -> CommandParser:
    """Of ``autoqra push``."""
    parser = CommandParser(
        "push",
        usage="FOLDER --repo_id OWNER/NAME [--FLAG VALUE ...]",
        description="Upload a plan, an adapter or a quantized base to the Hugging Face Hub: the files that belong to "
        "it, checked first, in one commit.",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="Folder of a plan, an adapter or a quantized base."
    )
    parser.add_argument(
        "--repo_id", required=True, metavar="OWNER/NAME", help="Repository to upload to; made where missing."
    )
    parser.add_argument("--private", action="store_true", help="A repository that is made is seen by its owner only.")
    parser.add_argument("--revision", metavar="BRANCH", help="Branch, made where missing; the main one by default.")
    parser.add_argument("--commit_message", metavar="TEXT", help="Of the commit; by default it says what is uploaded.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead of committing.")
    parser.add_argument("--token", help="Hub token; that of `hf auth login`, or $HF_TOKEN, by default.")
    parser.add_argument("--dry_run", action="store_true", help="Complete the card, check and list; upload nothing.")
    return parser


def export_parser() -> CommandParser:
    """Of ``autoqra export``."""
    parser = CommandParser(
        "export",
        usage="FOLDER --to FORMAT --output_dir DIR [--FLAG VALUE ...]",
        description="Write what was trained for tools that do not know this package.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="Saved adapter, or for gguf a plan; a folder or hub id.")
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(EXPORT_OPTIONS),
        help="Ordinary LoRA of one rank; the model with the adapter merged; the dequantized base without it, which "
        "plain-lora fits exactly; or tensor types for llama.cpp's llama-quantize.",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        metavar="DIR",
        type=Path,
        help="Folder to write to: new, empty or an earlier export.",
    )
    parser.add_argument(
        "--rank", type=int, metavar="N", help="plain-lora: LoRA rank to pad to; the adapter's largest by default."
    )
    parser.add_argument(
        "--dtype", choices=EXPORT_DTYPES, help="merged, base: of the weights; the base model's by default."
    )
    parser.add_argument(
        "--model_name_or_path",
        metavar="ID_OR_DIR",
        help="merged, base, gguf: the base model; where it was in training by default.",
    )
    parser.add_argument("--dry_run", action="store_true", help="Check, and say what would be written; write nothing.")
    return parser
