"""The runs that the tests of several processes look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
"""What accelerate makes of examples/accelerate/fsdp2.yaml, as far as it matters here."""
NATIVE = ("--bits", "3", "--lora_r", "4", "--num_calibration_sequences", "4")
EACH_READS = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
BF16 = ("--bf16", "true", "--learning_rate", "1e-3")
"""SFTConfig's default on GPUs; Adam's first steps make much of rounded gradients, hence the rate."""
CHECKPOINTING = ("--gradient_checkpointing", "true")
NF4 = ("--quant_backend", "bitsandbytes", "--bits", "4", "--lora_r", "4")

INT8 = ("--quant_backend", "bitsandbytes", "--bits", "8", "--lora_r", "4")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One ``autoqra train``; two processes take half the batch each, so that the steps are the same as of one.

    Attributes:
        name: of its output directory.
        num_processes: 1 or 2.
        bits: the flags of the quantizer; None for the plan that lies in the folder.
        resumes: the scenario whose second step it goes on from.
        variables: as the launcher sets them.
        more: further flags.
    """

    name: str
    num_processes: int
    bits: tuple[str, ...] | None
    resumes: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()

    @property
    def shards(self) -> bool:
        """Whether accelerate is to take these CPUs for GPUs; it refuses FSDP otherwise."""
        return self.variables.get("FSDP_VERSION") == "2" and not self.name.startswith("refused")

    def flags(self, directory: Path) -> list[str]:
        quantizer = ["--plan", str(directory / "plan")] if self.bits is None else list(self.bits)
        resume = ["--resume_from_checkpoint", str(directory / self.resumes / "checkpoint-2")] if self.resumes else []
        # six held-out examples: with two processes, batches that are full need no example twice
        batch = ["--per_device_train_batch_size", str(4 // self.num_processes), "--per_device_eval_batch_size", "3"]
        steps = ["--max_steps", "4", "--save_steps", "2", "--lr_scheduler_type", "constant", "--learning_rate", "1e-2"]
        return [*quantizer, *resume, *batch, *steps, *self.more]


SCENARIOS = (
    Scenario(name="single", num_processes=1, bits=NATIVE),
    Scenario(name="single-plan", num_processes=1, bits=None),
    Scenario(name="single-nf4", num_processes=1, bits=NF4),
    Scenario(name="single-int8", num_processes=1, bits=INT8),
    Scenario(name="single-bf16", num_processes=1, bits=NATIVE, more=BF16),
    Scenario(name="single-nf4-bf16", num_processes=1, bits=NF4, more=BF16),
    Scenario(name="ddp", num_processes=2, bits=NATIVE),
    Scenario(name="ddp-nf4", num_processes=2, bits=NF4),
    Scenario(name="ddp-resumed", num_processes=2, bits=None, resumes="single-plan"),
    Scenario(name="fsdp2", num_processes=2, bits=NATIVE, variables=FSDP),
    Scenario(name="fsdp2-plan", num_processes=2, bits=None, variables=FSDP, more=CHECKPOINTING),
    Scenario(name="fsdp2-each-reads", num_processes=2, bits=None, variables=FSDP | EACH_READS),
    Scenario(name="fsdp2-nf4", num_processes=2, bits=NF4, variables=FSDP),
    Scenario(
        name="fsdp2-resumed",
        num_processes=2,
        bits=None,
        resumes="single-plan",
        variables=FSDP,
        more=("--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "true"),
    ),
    Scenario(name="fsdp2-int8", num_processes=2, bits=INT8, variables=FSDP),
    Scenario(name="fsdp2-bf16", num_processes=2, bits=NATIVE, variables=FSDP, more=BF16),
    Scenario(name="fsdp2-nf4-bf16", num_processes=2, bits=NF4, variables=FSDP, more=BF16),
    Scenario(name="refused-fsdp1", num_processes=2, bits=NATIVE, variables=FSDP | {"FSDP_VERSION": "1"}),
    Scenario(name="refused-on-cpus", num_processes=2, bits=NATIVE, variables=FSDP),
    Scenario(name="refused-checkpoint", num_processes=2, bits=None, resumes="single"),
    Scenario(name="refused-plan", num_processes=2, bits=("--plan", "no-such-plan")),
)
