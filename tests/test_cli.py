"""The command line, called in-process on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from peft_autoqra import BitRankPlan, cli
from peft_autoqra.commands import parser, search, searcher_recipe, train
from peft_autoqra.importance import calibration_bank
from peft_autoqra.importance.error_table import ErrorTable
from peft_autoqra.sealed_record import unsealed
from tests.commands.plans import documented_keys
from tests.tiny_folder import SEARCH_FLAGS, TinyFolder, make_tiny_folder


@pytest.fixture(autouse=True)
def _own_data_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_llama) -> TinyFolder:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"), tiny_llama())


@pytest.fixture(scope="module")
def searched(tiny, tmp_path_factory) -> Path:
    """The directory of a finished search."""
    directory = tmp_path_factory.mktemp("search") / "out"
    assert cli.main(["search", *tiny.flags, *SEARCH_FLAGS, "--output_dir", str(directory)]) == 0
    return directory


def fails_with_one_line(capsys, argv: list[str], *words: str, status: int = 2) -> None:
    assert cli.main(argv) == status
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("autoqra")
    assert "Traceback" not in captured.err
    for word in words:
        assert word in line


def json_of(capsys, argv: list[str], documented_as: str) -> dict[str, Any]:
    """What a command prints with ``--json``; it has the keys that the documentation names."""
    assert cli.main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert documented_keys(documented_as) <= document.keys()
    return document


class TestMain:
    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out.startswith("autoqra 0.")

    def test_interrupt_says_how_to_go_on(self, capsys, monkeypatch):
        def interrupt(argv):
            raise KeyboardInterrupt

        monkeypatch.setattr(search, "run", interrupt)
        assert cli.main(["search"]) == 130
        assert "goes on from here" in capsys.readouterr().err


class TestRecipe:
    """Settings are read before anything is loaded, so no model is needed."""

    @pytest.fixture
    def parse(self, tmp_path, monkeypatch):
        def parse(recipe: dict | str, *flags: str):
            path = tmp_path / "recipe.yaml"
            path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
            seen = {}

            def stop(data, seed):
                raise KeyboardInterrupt

            original = searcher_recipe.RecipeParser.parse
            monkeypatch.setattr(
                searcher_recipe.RecipeParser,
                "parse",
                lambda self, argv: seen.setdefault("recipe", original(self, argv)),
            )
            monkeypatch.setattr(searcher_recipe, "load_datasets", stop)
            status = cli.main(["search", "--config", str(path), *flags])
            assert status == cli.EXIT_INTERRUPTED
            return seen["recipe"]

        return parse

    def test_flags_go_before_the_recipe_before_the_defaults(self, parse):
        recipe = parse({"learning_rate": 5e-4, "max_trials": 3, "weight_decay": 0.1}, "--max_trials", "4")
        _, _, search_args, args, *_ = recipe.settings
        assert (search_args.max_trials, search_args.num_seeds, args.learning_rate) == (4, 3, 5e-4)
        assert recipe.given == {"learning_rate": 5e-4, "max_trials": 4, "weight_decay": 0.1}

    def test_exponents_without_a_dot_and_single_list_items_are_understood(self, parse):
        recipe = parse("learning_rate: 1e-3\nrank_choices: 8\nbit_choices: [2, 4]\n")
        _, _, search_args, args, *_ = recipe.settings
        assert (args.learning_rate, search_args.rank_choices, search_args.bit_choices) == (1e-3, [8], [2, 4])

    def test_settings_of_other_commands_are_kept_for_them(self, parse):
        assert parse({"lora_dropout": 0.1}).given["lora_dropout"] == 0.1

    def test_tokens_are_not_written_to_disk(self, parse, tmp_path):
        recipe = parse({"hub_token": "secret-token", "seed": 3}, "--hub_token", "other-secret")
        recipe.save(tmp_path / "out")
        assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()) == {"seed": 3}

    def test_saved_recipe_gives_the_same_settings(self, parse, tmp_path):
        first = parse({"memory_budget": "3.2bit", "rank_choices": [0, 4], "max_steps": 5}, "--no_resume")
        first.save(tmp_path / "out")
        again = parse((tmp_path / "out" / "recipe.yaml").read_text())
        assert again.settings[2] == first.settings[2]
        assert again.given == first.given

    def test_environment_variables(self, parse, monkeypatch):
        monkeypatch.setenv("AUTOQRA_TEST", "before")
        parse({"env": {"AUTOQRA_TEST": 7}})
        assert os.environ["AUTOQRA_TEST"] == "7"

    @pytest.mark.parametrize(
        ("accelerator", "bf16", "use_cpu"),
        [
            ("mps", None, True),
            ("mps", True, True),
            (None, None, True),
            (None, False, True),
            (None, True, False),
            ("cuda", None, False),
        ],
    )
    def test_quantizer_takes_no_apple_gpu(self, monkeypatch, accelerator, bf16, use_cpu):
        device = torch.device(accelerator) if accelerator else None
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
        assert parser._must_use_cpu(bf16) is use_cpu

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("learning_rat: 1.0", ["learning_rat", "learning_rate"]),
            ("a: [1", ["no YAML"]),
            ("- 1", ["mapping"]),
            ("max_trials: many", ["max_trials", "many"]),
            ("max_cost: -1.0", ["max_cost=-1.0", "above 0"]),
            ("env: [1]", ["env=[1]", "mapping"]),
            ('bit_choices: [2, "4"]', ["bit_choices=[2, '4']", "integers"]),
            ("num_eval_sequences: 1.5", ["num_eval_sequences=1.5", "integer"]),
        ],
    )
    def test_mistakes_are_one_line(self, capsys, tmp_path, content, words):
        path = tmp_path / "recipe.yaml"
        path.write_text(content)
        fails_with_one_line(capsys, ["search", "--config", str(path)], *words)

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
            (["--config"], ["needs a file"]),
            (["--memory_budgt", "1"], ["--memory_budgt", "--memory_budget"]),
            (["--dtype", "int3"], ["int3"]),
            (["--train_file", "a.jsonl", "--dataset_name", "b"], ["not both"]),
        ],
    )
    def test_wrong_flags_are_one_line(self, capsys, flags, words):
        fails_with_one_line(capsys, ["search", *flags], *words)


class TestBadInputs:
    def test_no_data(self, capsys, tiny):
        fails_with_one_line(capsys, ["search", "--model_name_or_path", str(tiny.model)], "--train_file")

    def test_no_held_out_data(self, capsys, tiny):
        flags = ["--model_name_or_path", str(tiny.model), "--train_file", str(tiny.data / "train.jsonl")]
        fails_with_one_line(capsys, ["search", *flags], "--test_split_size")

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.jsonl", None, ["a.jsonl"]),
            ("a.xlsx", "x", [".xlsx"]),
            ("a.jsonl", "{broken", ["a.jsonl"]),
            ("a.csv", "text\n", ["a.csv"]),
        ],
    )
    def test_unusable_data_files(self, capsys, tiny, tmp_path, name, content, words):
        if content is not None:
            (tmp_path / name).write_text(content)
        flags = ["--model_name_or_path", str(tiny.model), "--train_file", str(tmp_path / name)]
        fails_with_one_line(capsys, ["train", *flags, "--test_split_size", "0.5"], *words)

    def test_model_that_is_not_there(self, capsys, tiny, tmp_path):
        argv = ["train", *tiny.flags, "--model_name_or_path", str(tmp_path / "nothing")]
        fails_with_one_line(capsys, [*argv, "--output_dir", str(tmp_path / "out")], "cannot be loaded")

    def test_model_with_broken_weights(self, capsys, tiny, tmp_path):
        shutil.copytree(tiny.model, tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
        argv = ["train", *tiny.flags, "--model_name_or_path", str(tmp_path / "model")]
        fails_with_one_line(capsys, [*argv, "--output_dir", str(tmp_path / "out")], "cannot be loaded")

    def test_model_of_an_unknown_type(self, capsys, tiny, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
        argv = ["train", *tiny.flags, "--model_name_or_path", str(tmp_path)]
        fails_with_one_line(capsys, [*argv, "--output_dir", str(tmp_path / "out")], "cannot be loaded", "unheard-of")

    @pytest.mark.parametrize("command", ["search", "train"])
    def test_output_directory_below_a_file(self, capsys, tiny, tmp_path, monkeypatch, command):
        (tmp_path / "file").touch()
        monkeypatch.setattr(train, "load_base_model", None)  # not reached: a fine-tune fails before it loads anything
        argv = [command, *tiny.flags, *(SEARCH_FLAGS if command == "search" else [])]
        fails_with_one_line(capsys, [*argv, "--output_dir", str(tmp_path / "file" / "out")], str(tmp_path / "file"))

    def test_unreachable_budget_names_the_smallest(self, capsys, tiny, tmp_path):
        argv = ["search", *tiny.flags, *SEARCH_FLAGS, "--memory_budget", "9kB", "--output_dir", str(tmp_path / "out")]
        fails_with_one_line(capsys, argv, "9,000 bytes cannot be reached", "smallest plan", status=3)
        assert not (tmp_path / "out").exists()

    def test_plan_and_bits_contradict(self, capsys, tiny):
        fails_with_one_line(capsys, ["train", *tiny.flags, "--plan", "p", "--bits", "3"], "bits", "plan")

    def test_no_plan_there(self, capsys, tiny, tmp_path):
        argv = ["train", *tiny.flags, "--plan", str(tiny.data), "--output_dir", str(tmp_path / "out")]
        fails_with_one_line(capsys, argv, "autoqra_plan.safetensors")

    def test_report_on_nothing(self, capsys, tmp_path):
        fails_with_one_line(capsys, ["report", str(tmp_path)], str(tmp_path))


class TestRuns:
    def test_dry_run_of_a_search_writes_nothing(self, capsys, tiny, tmp_path):
        argv = ["search", *tiny.flags, *SEARCH_FLAGS, "--output_dir", str(tmp_path / "out"), "--dry_run"]
        document = json_of(capsys, argv, "search --dry_run")
        assert document["uniform"]["8"]["total_bytes"] > document["smallest_bytes"]
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        assert f"{document['budget_bytes']:,} bytes" in text
        assert "8 bits r=16" in text
        assert "Smallest plan" in text
        assert "trials" in text
        assert not (tmp_path / "out").exists()

    def test_search_leaves_plan_recipe_and_report(self, searched):
        assert BitRankPlan.from_pretrained(searched / "plan").memory is not None
        assert (searched / "report.html").read_text().startswith("<!doctype html>")
        assert yaml.safe_load((searched / "recipe.yaml").read_text())["rank_choices"] == [0, 2, 4]

    def test_the_same_search_again_runs_no_trial_and_prints_the_result(self, capsys, searched):
        trials = (searched / "trials.jsonl").read_bytes()
        assert cli.main(["search", "--config", str(searched / "recipe.yaml")]) == 0
        assert (searched / "trials.jsonl").read_bytes() == trials
        text = capsys.readouterr().out
        assert "qlora-4bit" in text
        assert "full fine-tunes" in text
        assert "baseline" in text
        assert f"autoqra train --config {searched / 'recipe.yaml'} --plan {searched / 'plan'}" in text
        document = json_of(capsys, ["search", "--config", str(searched / "recipe.yaml")], "search")
        assert document["plan"] == str(searched / "plan")
        assert document.items() >= unsealed(json.loads((searched / "search_result.json").read_text())).items()
        shown = json_of(capsys, ["show", str(searched)], "show")
        assert shown["memory"]["total_bytes"] == document["winner"]["total_bytes"]

    def test_printed_next_command_trains(self, capsys, searched):
        cli.main(["search", "--config", str(searched / "recipe.yaml")])
        command = capsys.readouterr().out.splitlines()[-1].split()[1:]
        assert command[:2] == ["autoqra", "train"]
        assert cli.main(command[1:]) == 0
        adapter = searched / "adapter"
        result = json.loads((adapter / "finetune_result.json").read_text())
        assert result["measured"] == result["estimated"]
        assert f"held-out loss {result['eval_loss']:.4f}" in capsys.readouterr().out
        reloaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
        assert torch.isfinite(reloaded(input_ids=torch.arange(8)[None]).logits).all()

    def test_dry_run_of_a_fine_tune_writes_nothing(self, capsys, tiny, tmp_path):
        argv = ["train", *tiny.flags, "--bits", "3", "--r", "4", "--output_dir", str(tmp_path / "out"), "--dry_run"]
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        assert "average 3.00 bits and rank 4.0" in text
        assert "2 steps, about" in text
        document = json_of(capsys, argv, "train --dry_run")
        assert (document["num_steps"], document["average_bits"]) == (2, 3)
        assert not (tmp_path / "out").exists()

    def test_uniform_nf4_as_in_qlora(self, capsys, tiny, tmp_path):
        argv = ["train", *tiny.flags, "--quant_backend", "bitsandbytes", "--r", "4"]
        assert cli.main([*argv, "--output_dir", str(tmp_path / "out"), "--dry_run"]) == 0
        assert "(bitsandbytes); adapters start at zero" in capsys.readouterr().out
        document = json_of(capsys, [*argv, "--output_dir", str(tmp_path / "out")], "train")
        assert (document["quantizer"], document["initialization"]) == ("bitsandbytes", "zero")
        assert document["measured"] == document["estimated"]

    def test_part_of_the_training_data_can_be_held_out(self, tiny, tmp_path, monkeypatch):
        seen = {}

        def capture(inputs):
            seen.update(vars(inputs))
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "FineTune", capture)
        flags = ["--model_name_or_path", str(tiny.model), "--train_file", str(tiny.data / "train.jsonl")]
        argv = ["train", *flags, "--test_split_size", "0.25", "--output_dir", str(tmp_path / "out")]
        assert cli.main(argv) == cli.EXIT_INTERRUPTED
        assert (len(seen["train_dataset"]), len(seen["eval_dataset"])) == (9, 3)

    def test_report_prints_its_path(self, capsys, searched, tmp_path):
        assert cli.main(["report", str(searched), "--output", str(tmp_path / "page.html")]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
        assert "<svg" in (tmp_path / "page.html").read_text()
        document = json_of(capsys, ["report", str(searched), "--output", str(tmp_path / "again.html")], "report")
        assert document["report"] == str(tmp_path / "again.html")


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("calibrate") / "out"
    assert cli.main(["calibrate", *tiny.flags, *SEARCH_FLAGS, "--output_dir", str(directory)]) == 0
    return directory


class TestCalibrate:
    def test_writes_the_table_that_the_search_starts_from(self, tiny, calibrated, capsys, monkeypatch):
        table = ErrorTable.load(calibrated / "calibration" / "error_table.safetensors")
        flags = [*tiny.flags, *SEARCH_FLAGS, "--output_dir", str(calibrated)]
        assert cli.main(["calibrate", *flags]) == 0
        text = capsys.readouterr().out
        assert f"{table.rises[:, table.bit_choices.index(2), 0].sum():.4g}" in text
        monkeypatch.setattr(calibration_bank, "calibrate", lambda *_, **__: pytest.fail("measured again"))
        document = json_of(capsys, ["calibrate", *flags], "calibrate")
        rises = {(entry["bits"], entry["rank"]): entry["rise"] for entry in document["uniform_rises"]}
        assert rises[2, 0] == pytest.approx(table.rises[:, table.bit_choices.index(2), 0].sum())
        assert cli.main(["search", *flags]) == 0

    def test_a_dry_run_tells_how_much_will_be_kept(self, tiny, calibrated, capsys, tmp_path):
        flags = [*tiny.flags, *SEARCH_FLAGS, "--output_dir"]
        assert cli.main(["calibrate", *flags, str(tmp_path / "none"), "--dry_run"]) == 0
        assert not (tmp_path / "none").exists()
        text = capsys.readouterr().out
        assert "14 modules" in text
        document = json_of(capsys, ["calibrate", *flags, str(tmp_path / "none"), "--dry_run"], "calibrate --dry_run")
        assert document["num_modules"] == 14
        said = [float(number.replace(",", "")) for number in re.findall(r"([\d.,]+) [kM]B", text)]
        kept = [
            sum(f.stat().st_size for f in calibrated.rglob(f"{kind}-*/**/*.safetensors"))
            for kind in ("statistics", "bank")
        ]
        assert kept[0] < 1.5e3 * said[0]  # headers come on top, shared Grams are kept once
        assert kept[1] < 3e3 * said[1]


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "adapter"
    assert cli.main(["train", *tiny.flags, "--bits", "3", "--r", "4", "--output_dir", str(directory)]) == 0
    return directory


class TestExport:
    def test_plain_lora(self, capsys, adapter, tmp_path):
        out = tmp_path / "out"
        assert cli.main(["export", str(adapter), "--to", "plain-lora", "--output_dir", str(out), "--rank", "20"]) == 0
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 20
        assert capsys.readouterr().out == f"{out}\nrank 20 everywhere; vLLM: --max-lora-rank 32 or more\n"

    @pytest.mark.parametrize("to", ["merged", "base"])
    def test_checkpoints(self, capsys, adapter, tmp_path, to):
        out = tmp_path / "out"
        assert cli.main(["export", str(adapter), "--to", to, "--output_dir", str(out), "--dtype", "bfloat16"]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16

    @pytest.mark.parametrize("to", ["plain-lora", "merged", "base", "gguf"])
    def test_a_dry_run_foretells_the_files(self, capsys, adapter, tmp_path, to):
        argv = ["export", str(adapter), "--to", to, "--output_dir", str(tmp_path / "out")]
        assert cli.main([*argv, "--dry_run"]) == 0
        assert "Nothing was written" in capsys.readouterr().out
        is_checkpoint = to in ("merged", "base")
        forecast = json_of(
            capsys, [*argv, "--dry_run"], "export --dry_run` of merged and base" if is_checkpoint else "export"
        )
        assert not list(tmp_path.iterdir())
        document = json_of(capsys, argv, "export")
        assert set(document["file_bytes"]) == {path.name for path in (tmp_path / "out").iterdir()}
        if is_checkpoint:
            with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
                written = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 -- no mapping
            assert forecast["weight_bytes"] == written
            assert set(forecast["tokenizer_files"]) <= set(document["file_bytes"])
        else:
            assert forecast["file_bytes"] == {**document["file_bytes"]}

    def test_a_dry_run_refuses_what_the_export_would(self, capsys, adapter):
        argv = ["export", str(adapter), "--to", "merged", "--output_dir", str(adapter), "--dry_run"]
        fails_with_one_line(capsys, argv, "no earlier export wrote")

    def test_gguf_again_into_the_same_folder(self, capsys, adapter, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        argv = ["export", str(adapter), "--to", "gguf", "--output_dir", "out"]
        assert cli.main(argv) == cli.main(argv) == 0
        text = capsys.readouterr().out
        assert "14 planned tensors" in text
        assert f"llama-quantize --tensor-type-file {tmp_path}/out/tensor_types.txt" in text
        assert "Tensors that fall back to another type: 14 (" in text
        assert len((tmp_path / "out" / "tensor_types.txt").read_text().splitlines()) == 15

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--to", "onnx"], ["onnx", "plain-lora"]),
            (["--to", "gguf", "--rank", "8"], ["--rank", "--to gguf"]),
            (["--to", "plain-lora", "--dtype", "float16"], ["--dtype", "--to plain-lora"]),
            (["--to", "plain-lora", "--rank", "2"], ["rank=2", "largest rank, 4"]),
            (["--to", "merged", "--model_name_or_path", "nowhere/nothing"], ["nowhere/nothing"]),
        ],
    )
    def test_mistakes_are_one_line(self, capsys, adapter, tmp_path, flags, words):
        argv = ["export", str(adapter), *flags, "--output_dir", str(tmp_path / "out")]
        fails_with_one_line(capsys, argv, *words)
        assert not list(tmp_path.iterdir())

    def test_other_folders_are_left_alone(self, capsys, adapter):
        argv = ["export", str(adapter), "--to", "merged", "--output_dir", str(adapter)]
        fails_with_one_line(capsys, argv, "no earlier export wrote")
        assert (adapter / "adapter_model.safetensors").exists()
