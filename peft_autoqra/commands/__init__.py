"""The subcommands of ``autoqra``."""
