"""A run from its method to its record, and the queue that works off a configuration."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from benchmarks.finetune.budget import limit_of
from benchmarks.finetune.config import Config, Group
from benchmarks.finetune.method import Method, NotApplicable, Prepared
from benchmarks.finetune.methods.adalora import QAdaLora
from benchmarks.finetune.methods.lora import Lora
from benchmarks.finetune.methods.qlora import Qlora
from benchmarks.finetune.methods.uniform_like import UniformLike
from benchmarks.finetune.plan_method import AllocationUnderWay, PlanMethod
from benchmarks.finetune.queue import Queue
from benchmarks.finetune.records import Record, Run, Split, read_records
from benchmarks.finetune.scoring import score
from benchmarks.finetune.setting import Recipe, Setting
from benchmarks.finetune.tasks import SplitSizes, Task
from benchmarks.finetune.training import PlainLossTrainer, run_method
from peft_autoqra import MemoryModel
from peft_autoqra.errors import EvaluationError
from tests.conftest import TinyLlamaFactory
from tests.tiny_data import word_tokenizer

BUDGET = "stored:qlora-3bit-r4"
NUM = {"train": 24, "dev": 6, "test": 7}
RECIPE = Recipe(max_steps=3, batch_size=4, max_length=32, learning_rate=1e-3)
RUN = Run(config="tiny", task="choices", method="lora-r4", budget=None, learning_rate=1e-3, seed=0)


@dataclass(frozen=True, kw_only=True)
class ChoiceSetting(Setting):
    """Prompts of several lengths with one of two answers."""

    @cached_property
    def task(self) -> Task:
        splits = {name: questions(seed, num) for seed, (name, num) in enumerate(NUM.items())}
        return Task(name="choices", **splits, metric="accuracy", max_new_tokens=4)


def questions(seed: int, num: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (num,), generator=generator).tolist()
    words = [torch.randint(5, 100, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict(
        {
            "prompt": [" ".join(f"w{word}" for word in row) for row in words],
            "completion": [f" w{sum(row) % 2 + 1}" for row in words],
        }
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: TinyLlamaFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().to(torch.bfloat16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def setting(tmp_path: Path, model_folder: Path) -> ChoiceSetting:
    sizes = SplitSizes(**NUM)
    return ChoiceSetting(
        model_id=str(model_folder), task_name="choices", sizes=sizes, recipe=RECIPE, cache_dir=tmp_path
    )


def trainer_on(setting: ChoiceSetting, model: PreTrainedModel, *, completion_only_loss: bool = False) -> SFTTrainer:
    args, test = args_of(setting), setting.task.test
    args.completion_only_loss, args.per_device_eval_batch_size = completion_only_loss, len(test)
    return SFTTrainer(
        model=model, args=args, train_dataset=test, eval_dataset=test, processing_class=setting.tokenizer
    )


def scored(model: torch.nn.Module, setting: ChoiceSetting) -> Split:
    with torch.autocast("cpu", torch.bfloat16):  # as the trainer does
        return score(model, setting, setting.test_rows, setting.task.test)


def test_losses_equal_those_of_the_trainer(setting: ChoiceSetting) -> None:
    model = setting.load_base()
    split = scored(model, setting)
    assert split.loss == pytest.approx(trainer_on(setting, model).evaluate()["eval_loss"], abs=1e-4)
    assert math.fsum(split.losses) / len(split.losses) == pytest.approx(split.loss, abs=1e-5)
    answers = trainer_on(setting, model, completion_only_loss=True).evaluate()["eval_loss"]
    assert split.answer_loss == pytest.approx(answers, abs=1e-4)
    assert abs(split.answer_loss - split.loss) > 1e-3


def test_losses_of_texts_that_are_cut_off_are_of_what_is_left(setting: ChoiceSetting) -> None:
    model, test = setting.load_base(), setting.task.test
    rows = setting.test_rows
    longer = rows.map(lambda row: {"completion_mask": row["completion_mask"] + [1, 1, 1]})
    with torch.autocast("cpu", torch.bfloat16):
        assert score(model, setting, longer, test) == score(model, setting, rows, test)


def test_the_answer_is_the_likelier_token_after_the_prompt(setting: ChoiceSetting) -> None:
    model, test = setting.load_base().float(), setting.task.test
    split = score(model, setting, setting.test_rows, test)
    right = ""
    for row in test:
        logits = model(**setting.tokenizer(row["prompt"], return_tensors="pt")).logits[0, -1].detach()
        answers = setting.tokenizer("w1 w2").input_ids
        likelier = max(answers, key=lambda token: float(logits[token]))
        right += "1" if setting.tokenizer(row["completion"]).input_ids == [likelier] else "0"
    assert split.right == right
    assert "0" in right
    assert "1" in right
    assert split.metric == pytest.approx(right.count("1") / len(right))


def test_the_plain_loss_trains_as_trl_does(setting: ChoiceSetting) -> None:
    """Same data, same steps: the figures differ by rounding alone."""
    losses = []
    for kind in (PlainLossTrainer, SFTTrainer):
        torch.manual_seed(0)
        model = Lora(rank=4).prepare(setting, None, args_of(setting)).model
        before = scored(model, setting).loss
        kind(
            model=model,
            args=args_of(setting),
            train_dataset=setting.task.train,
            processing_class=setting.tokenizer,
        ).train()
        losses.append(scored(model, setting).loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert abs(losses[0] - before) > 1e-3


def args_of(setting: ChoiceSetting) -> SFTConfig:
    return setting.recipe.sft_config(setting.folder)


def test_a_run_ends_in_a_whole_record(setting: ChoiceSetting) -> None:
    record = run_method(Lora(rank=4), RUN, setting, decoded=False)
    assert (record.status, record.num_steps, record.mean_bits, record.mean_rank) == ("completed", 3, 16, 4)
    assert record.memory is not None
    assert record.memory.measured == record.memory.predicted
    assert record.memory.is_kept
    assert record.dev is not None
    assert record.test is not None
    assert (len(record.dev.losses), len(record.test.losses)) == (NUM["dev"], NUM["test"])
    assert {"torch", "peft", "trl"} <= record.environment["versions"].keys()


@pytest.mark.parametrize(
    ("method", "budget"), [(PlanMethod(UniformLike()), BUDGET), (Qlora(rank=4), None)], ids=["native", "nf4"]
)
def test_decoding_once_changes_neither_figures_nor_bytes(
    method: Method, budget: str | None, setting: ChoiceSetting
) -> None:
    run = replace(RUN, method=method.name, budget=budget)
    decoded, quantized = (run_method(method, run, setting, decoded=flag) for flag in (True, False))
    assert decoded.test == quantized.test
    assert decoded.memory == quantized.memory
    assert decoded.memory is not None
    assert decoded.memory.measured == decoded.memory.predicted
    assert decoded.memory.is_kept
    assert (decoded.memory.budget_bytes, decoded.memory.scope) == limit_of_run(budget, setting)


def limit_of_run(budget: str | None, setting: ChoiceSetting) -> tuple[int | None, str]:
    if budget is None:
        return None, "training"
    limit = limit_of(budget, MemoryModel.from_model(setting.load_base()))
    return limit.limit_bytes, limit.scope


def test_all_methods_see_the_same_batches_in_the_same_order(
    setting: ChoiceSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they draw at random before; runs with one seed are compared as pairs."""
    batches: list[list[Tensor]] = []
    step = PlainLossTrainer.training_step

    def training_step(self: PlainLossTrainer, model: nn.Module, inputs: dict[str, Tensor], *rest: object) -> Tensor:
        batches[-1].append(inputs["input_ids"].clone())
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(PlainLossTrainer, "training_step", training_step)
    methods: list[tuple[Method, str | None]] = [
        (Lora(rank=4), None),
        (Qlora(rank=2), None),
        (QAdaLora(initial_rank=6, rank=4), None),
        (PlanMethod(UniformLike()), BUDGET),
    ]
    for method, budget in methods:
        batches.append([])
        run_method(method, replace(RUN, method=method.name, budget=budget), setting, decoded=True)
    first, *others = batches
    assert len(first) == RECIPE.max_steps
    assert all(len(other) == len(first) and all(map(torch.equal, first, other)) for other in others)
    batches.append([])
    run_method(Lora(rank=4), replace(RUN, seed=1), setting, decoded=True)
    assert not all(map(torch.equal, first, batches[-1])), "another seed is another order"


def test_a_run_leaves_no_model_behind(setting: ChoiceSetting) -> None:
    """Trainers and models refer to themselves; a queue makes hundreds."""
    models: list[weakref.ref[nn.Module]] = []

    @dataclass(frozen=True)
    class Watched:
        name: str = "lora-r4"
        needs_budget: bool = False

        def prepare(self, *given: Any) -> Prepared:
            prepared = Lora(rank=4).prepare(*given)
            models.append(weakref.ref(prepared.model))
            return prepared

    gc.disable()  # so that nothing is collected by chance
    try:
        run_method(Watched(), RUN, setting, decoded=False)
        assert models[0]() is None
    finally:
        gc.enable()


def test_the_same_run_gives_the_same_figures(setting: ChoiceSetting) -> None:
    first, second = (run_method(Lora(rank=4), RUN, setting, decoded=False) for _ in range(2))
    other = run_method(Lora(rank=4), replace(RUN, seed=1), setting, decoded=False)
    assert first.test == second.test
    assert first.test != other.test


def test_a_run_that_diverges_says_so(setting: ChoiceSetting) -> None:
    record = run_method(Lora(rank=4), replace(RUN, learning_rate=1e30), setting, decoded=False)
    assert record.status == "diverged"
    assert "loss is" in record.reason
    assert record.test is None


def test_a_plan_is_chosen_once_and_not_by_two_processes(
    setting: ChoiceSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = PlanMethod(UniformLike())
    folder = method.plan_folder(setting, BUDGET)
    folder.parent.mkdir(parents=True)
    nested: list[type[BaseException]] = []
    allocate = UniformLike.allocate

    def allocate_beside_another(self: UniformLike, *given: object) -> object:
        with pytest.raises(AllocationUnderWay):
            method.prepare(setting, BUDGET, args_of(setting))
        nested.append(AllocationUnderWay)
        return allocate(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(UniformLike, "allocate", allocate_beside_another)
    first = method.prepare(setting, BUDGET, args_of(setting))
    second = method.prepare(setting, BUDGET, args_of(setting))
    assert len(nested) == 1
    assert first.spent == second.spent


def test_a_seed_starts_adapters_alike_whether_a_plan_was_found_or_chosen(
    setting: ChoiceSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a search draws must not reach the run that happens to come first."""
    method, budget = PlanMethod(UniformLike(calibrated=False)), BUDGET
    allocate = UniformLike.allocate

    def allocate_by_chance(self: UniformLike, *given: Any) -> object:
        torch.rand(3)
        return allocate(self, *given)

    monkeypatch.setattr(UniformLike, "allocate", allocate_by_chance)
    run = replace(RUN, method=method.name, budget=budget)
    chosen, found = (run_method(method, run, setting, decoded=True) for _ in range(2))
    assert chosen.test == found.test


def test_completions_that_are_cut_off_are_refused_before_training(setting: ChoiceSetting) -> None:
    short = replace(setting, recipe=replace(RECIPE, max_length=5))
    with pytest.raises(EvaluationError, match="held-out examples of choices begin beyond max_length=5"):
        run_method(Lora(rank=4), RUN, short, decoded=False)


@dataclass(frozen=True)
class Impossible:
    name: str = "impossible"
    needs_budget: bool = False

    def prepare(self, *_: object) -> Prepared:
        raise NotApplicable("it cannot be done")


def make_config(setting: ChoiceSetting, learning_rates: tuple[float, ...], group: Group) -> Config:
    return Config(
        name="tiny",
        model="tiny",
        tasks=("choices",),
        sizes=setting.sizes,
        recipe=setting.recipe,
        learning_rates=learning_rates,
        groups=(group,),
    )


def test_the_queue_records_every_run_once_and_goes_on(setting: ChoiceSetting, tmp_path: Path) -> None:
    config = make_config(setting, (1e-3, 2e-3), Group(methods=("lora-r4", "impossible"), seeds=(0, 1)))
    methods: dict[str, Method] = {"lora-r4": Lora(rank=4), "impossible": Impossible()}
    queue = Queue(config, methods, {"choices": setting}, tmp_path / "tiny.jsonl", tmp_path / "locks")
    reported: list[Record] = []
    queue.work(reported.append, max_seconds=0)
    assert len(reported) == 0
    queue.work(reported.append)
    recorded = read_records([tmp_path / "tiny.jsonl"])
    assert [record.run for record in recorded] == [record.run for record in reported]
    statuses = [(record.run.method, record.status) for record in recorded]
    assert statuses.count(("lora-r4", "completed")) == 3, "two rates, and the better one with the other seed"
    assert statuses.count(("impossible", "not applicable")) == 2
    queue.work(reported.append)
    assert len(read_records([tmp_path / "tiny.jsonl"])) == len(recorded)


def test_records_of_another_recipe_are_not_mixed_in(setting: ChoiceSetting, tmp_path: Path) -> None:
    config = make_config(setting, (1e-3,), Group(methods=("impossible",), seeds=(0,)))
    records = tmp_path / "tiny.jsonl"
    queue = Queue(config, {"impossible": Impossible()}, {"choices": setting}, records, tmp_path / "locks")
    queue.work(lambda _: None)
    other = replace(setting, recipe=replace(setting.recipe, max_steps=4))
    changed = Queue(config, {"impossible": Impossible()}, {"choices": other}, records, tmp_path / "locks")
    with pytest.raises(SystemExit, match="another recipe"):
        changed.work(lambda _: None)


def test_a_run_that_finds_no_memory_left_is_recorded_and_others_go_on(
    setting: ChoiceSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(PlainLossTrainer, "compute_loss", out_of_memory)
    record = run_method(Lora(rank=4), RUN, setting, decoded=False)
    assert record.status == "not applicable"
    assert "out of memory" in record.reason
