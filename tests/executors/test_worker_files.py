"""A worker that has files alone gives the losses of the search's own process."""

from __future__ import annotations

import importlib
import json
import shutil
import sys

import pytest
import torch

from peft_autoqra.errors import CalibrationError, ExecutorError
from peft_autoqra.evaluation.named_objective import FunctionObjective
from peft_autoqra.executors.worker import TrialWorker, WorkerSettings, evaluate_here
from peft_autoqra.executors.worker_files import WorkerFiles, WorkerFilesNotSeenError, write_worker_files
from peft_autoqra.executors.worker_source import WorkerSource
from peft_autoqra.importance.calibration_bank import bank_folder
from peft_autoqra.trial import TrialResult

SETTINGS = WorkerSettings(num_threads=1, memory_share=1.0)


@pytest.fixture(scope="module")
def opened(make_searcher, tmp_path_factory):
    searcher = make_searcher(tmp_path_factory.mktemp("search"))
    with searcher.opened():
        yield searcher


@pytest.fixture
def source(opened):
    source = WorkerSource(opened.setup, opened.calibrate(), cache_dir=opened.cache_dir, directory=opened.output_dir)
    yield source
    source.close()


@pytest.fixture(scope="module")
def trials(opened):
    """One trained natively, one untrained is not asked before these; one of bitsandbytes."""
    return opened.ask(3)


def losses(result: TrialResult) -> tuple:
    assert result.error is None
    return result.loss, result.sequence_losses


def test_bit_for_bit(source, trials):
    own = source.evaluator()
    expected = [losses(own.evaluate(trial.plan, trial.fidelity)) for trial in trials]
    source.close()
    for memory_share in (1.0, 0.0):  # decoded weights are kept, or are not
        worker = TrialWorker(source.files, WorkerSettings(1, memory_share))
        sent = [json.loads(json.dumps(trial.to_dict())) for trial in reversed(trials)]
        found = [losses(TrialResult.from_dict(worker.evaluate(record))) for record in sent]
        assert found[::-1] == expected


def test_copies_elsewhere_will_do_when_the_first_are_gone(source, trials, tmp_path):
    for name, path in source.files.all().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / name)
    worker = TrialWorker(WorkerFiles.below(tmp_path), SETTINGS)
    shutil.rmtree(tmp_path)  # mapped files stay readable
    source.close()
    own = source.evaluator()
    record = worker.evaluate(trials[0].to_dict())
    assert losses(TrialResult.from_dict(record)) == losses(own.evaluate(trials[0].plan, trials[0].fidelity))


def test_a_process_keeps_its_worker_until_another_search_comes(source, trials, monkeypatch):
    made = []
    monkeypatch.setattr(
        "peft_autoqra.executors.worker.TrialWorker", lambda *args: made.append(args) or TrialWorker(*args)
    )
    files = source.files
    record = trials[0].to_dict()
    first, again = (evaluate_here(files, SETTINGS, record) for _ in range(2))
    assert first["sequence_losses"] == again["sequence_losses"]
    assert len(made) == 1
    with pytest.raises(WorkerFilesNotSeenError):
        evaluate_here(WorkerFiles(files.folder / "other", files.bank), SETTINGS, record)
    evaluate_here(files, SETTINGS, record)
    assert [args[0] == files for args in made] == [True, False, True]


def test_the_files_are_removed_and_the_model_is_left_as_it_was(opened, source):
    before = {name: value.clone() for name, value in opened.setup.model.state_dict().items()}
    (opened.output_dir / "workers-of-a-killed-search").mkdir()
    folder = source.files.folder
    assert (folder / "setup.pt").is_file()
    worker = TrialWorker(source.files, SETTINGS)
    for parameter in worker._evaluator._resident.model.parameters():
        parameter.data.zero_()  # of the worker's view alone
    source.close()
    assert not list(opened.output_dir.glob("workers-*"))
    assert all(torch.equal(before[name], value) for name, value in opened.setup.model.state_dict().items())
    assert len(opened.setup.data.train) == 24


def test_what_a_worker_cannot_use_is_named(source, tmp_path):
    files = source.files
    with pytest.raises(WorkerFilesNotSeenError, match=r"does not see .*nowhere.*all machines share"):
        TrialWorker(WorkerFiles(tmp_path / "nowhere", files.bank), SETTINGS)
    with pytest.raises(WorkerFilesNotSeenError, match="does not see"):
        TrialWorker(WorkerFiles(files.folder, tmp_path / "nowhere"), SETTINGS)
    with pytest.raises(CalibrationError, match=r"of 'model\.layers\.0\.self_attn\.q_proj' at 2 bits"):
        TrialWorker(WorkerFiles(files.folder, tmp_path), SETTINGS)
    versions = json.loads((files.folder / "versions.json").read_text())
    (files.folder / "versions.json").write_text(json.dumps(versions | {"peft": "0.0.1"}))
    with pytest.raises(ExecutorError, match=r"peft 0\.0\.1 there, .* here.*same versions"):
        TrialWorker(files, SETTINGS)
    (files.folder / "versions.json").write_text(json.dumps(versions))
    (files.folder / "setup.pt").write_bytes(b"nothing")
    with pytest.raises(ExecutorError, match="cannot load the model"):
        TrialWorker(files, SETTINGS)


def test_code_that_a_worker_lacks_is_named(opened, tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text("def losses(model, tokenizer, examples): return [0.0 for _ in examples]")
    with monkeypatch.context() as here:
        here.syspath_prepend(tmp_path)
        here.setattr(opened.setup, "objective", FunctionObjective(importlib.import_module("own_losses").losses))
        files = write_worker_files(opened.setup, opened.calibrate(), tmp_path / "files", tmp_path)
        del sys.modules["own_losses"]
    with pytest.raises(ExecutorError, match=r"lacks code of the search \(No module named 'own_losses'\); define"):
        TrialWorker(files, SETTINGS)


def test_a_model_that_cannot_be_pickled_is_refused(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(opened.setup.model, "found_in_a_script", lambda: None, raising=False)
    with pytest.raises(ExecutorError, match="cannot be sent to other processes"):
        write_worker_files(opened.setup, opened.calibrate(), tmp_path / "files", tmp_path)


def test_a_full_disk_is_an_error_with_a_remedy(opened, tmp_path):
    (tmp_path / "files").write_text("in the way")
    with pytest.raises(ExecutorError, match="use another output_dir"):
        write_worker_files(opened.setup, opened.calibrate(), tmp_path / "files", tmp_path)


def test_the_bank_lies_where_the_search_says(opened, source):
    assert source.files.bank == bank_folder(opened.cache_dir, opened.calibrate().fingerprint).resolve()
    assert source.weight_bytes == sum(p.nbytes for p in opened.setup.model.parameters())
    assert not source.needs_gpu
