"""README and guides: code that compiles or runs, flags and links that exist, figures that the code computes."""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import peft_autoqra
from peft_autoqra import BitRankPlan, MemoryEstimate, MemoryModel, QuantizerSettings, calibrate_plan, cli, uniform_plan
from peft_autoqra.commands.tables import MEMORY_PARTS
from peft_autoqra.errors import AutoQRAError
from peft_autoqra.units import format_bytes
from tests.conftest import TinyLlamaFactory
from tests.tiny_data import word_tokenizer
from tests.tiny_folder import TinyFolder, make_tiny_folder

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return found


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------- code
def test_there_are_pages_to_check() -> None:
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 10
    assert sum(len(blocks(page, "bash")) for page in PAGES) >= 8


@every_page
def test_python_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


@every_page
def test_bash_parses(page: Path) -> None:
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.fixture(scope="module")
def known_flags() -> dict[str, str]:
    """Command to its whole help; not all have --help_all."""
    return {command: help_of(command, "--help_all") or help_of(command, "--help") for command in cli.COMMANDS}


def help_of(command: str, flag: str) -> str:
    ignored = contextlib.redirect_stderr(io.StringIO())
    with contextlib.redirect_stdout(io.StringIO()) as printed, ignored, contextlib.suppress(SystemExit):
        cli.main([command, flag])
    return printed.getvalue()


@every_page
def test_flags_are_real(page: Path, known_flags: dict[str, str]) -> None:
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    snippets = re.findall(r"`(autoqra \w+ [^`\n]*)`", prose(page))
    for line in [*joined.splitlines(), *snippets]:
        typed = line.replace("scripts/finetune.py", "autoqra train").partition("autoqra ")[2]
        command, _, flags = typed.partition(" ")
        if command.isidentifier() and command.islower():
            for flag in re.findall(r"--(\w[\w-]*)", flags):
                assert re.search(rf"--{flag}\b", known_flags[command]), f"{page.name}: autoqra {command} --{flag}"


@every_page
def test_scripts_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    scripts = re.findall(r"((?:scripts|examples|benchmarks)/[\w/]+\.\w+)\b", text)
    assert [script for script in scripts if not (REPOSITORY / script).exists()] == []
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)\b", text, re.MULTILINE)) <= targets


# --------------------------------------------------------------------------------------------------------------- links
def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("pattern", ["docs/*.md", "examples/*.py", "examples/*.ipynb"])
def test_readme_links_every_guide_and_example(pattern: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (REPOSITORY / "README.md").read_text())
    paths = {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob(pattern)}
    assert paths
    assert paths - set(links) == set()


# ------------------------------------------------------------------------------------------------------- what it says
LLAMAS = {
    "SmolLM2 135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "Llama 3.2 1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "Llama 3.1 8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Llama 3.1 70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
QLORA = QuantizerSettings(backend="bitsandbytes")


def memory_of(name: str) -> MemoryModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMAS[name]), dtype=torch.bfloat16)
    return MemoryModel.from_model(model)


def trained_bytes(estimate: MemoryEstimate) -> int:
    return estimate.adapter_bytes + estimate.gradient_bytes + estimate.optimizer_bytes


def table_rows(page: str) -> list[str]:
    return [line for line in (DOCS / page).read_text().splitlines() if line.startswith("|")]


def whole_model_rows() -> list[str]:
    memory = memory_of("Llama 3.1 8B")
    plans = [(16, 16, None), (4, 16, QLORA), (8, 4, None), (3, 16, None), (3, 4, None)]
    estimates = [memory.estimate(memory.uniform(bits, rank), quantizer) for bits, rank, quantizer in plans]
    parts = {title: [getattr(e, name) for e in estimates] for name, title in MEMORY_PARTS.items()}
    parts |= {"**stored**": [e.stored_bytes for e in estimates], "**training**": [e.total_bytes for e in estimates]}
    return [f"| {title} | {' | '.join(map(format_bytes, sizes))} |" for title, sizes in parts.items()]


def rank_price_rows() -> list[str]:
    rows = []
    for name, sizes in LLAMAS.items():
        memory = memory_of(name)
        qlora = memory.estimate(memory.uniform(4, 16), QLORA)
        training, stored = (8 * size / memory.num_weights for size in (trained_bytes(qlora), qlora.adapter_bytes))
        shares = [size / qlora.total_bytes for size in (trained_bytes(qlora), qlora.untouched_bytes)]
        rows.append(
            f"| {name} | {sizes['hidden_size']} | {training:.1f} bits | {stored:.1f} bits | "
            f"{shares[0]:.0%} | {shares[1]:.0%} |"
        )
    return rows


def test_memory_of_a_whole_model() -> None:
    assert set(whole_model_rows()) <= set(table_rows("memory.md"))


def test_price_of_a_rank() -> None:
    assert set(rank_price_rows()) <= set(table_rows("budget.md"))


def test_memory_of_one_layer() -> None:
    layer = nn.Sequential(nn.Linear(4096, 14336, bias=False, device="meta", dtype=torch.bfloat16))
    memory = MemoryModel.from_model(layer, target_modules=["0"])
    estimate = memory.estimate(memory.uniform(3, 16))
    cells = {row.split("|")[1].strip(): row.split("|")[3].strip() for row in table_rows("memory.md") if "14336" in row}
    assert cells["weights"] == f"{estimate.weight_bytes:,}"
    assert cells["adapters"] == f"{estimate.adapter_bytes:,}"
    assert cells["optimizer"] == f"{estimate.optimizer_bytes:,}"
    assert f"| metadata | G = 917,504; 2 G + 8 * 3584 | {estimate.metadata_bytes:,} |" in table_rows("memory.md")
    assert f"| gradients | the same | {estimate.gradient_bytes:,} |" in table_rows("memory.md")


def test_activations_of_checkpointed_blocks(tiny_llama: TinyLlamaFactory) -> None:
    """The blocks' inputs in bfloat16 and the logits in float32, as docs/memory.md says."""
    model = tiny_llama(num_hidden_layers=3).bfloat16().train()
    model.activation_checkpointing_enable()
    tokens = torch.arange(32).view(2, 16)
    kept: dict[int, tuple[torch.Size, torch.dtype]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = (tensor.shape, tensor.dtype)
        return tensor

    model.requires_grad_(False)
    model.enable_input_require_grads()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert list(kept.values()).count((torch.Size([2, 16, 64]), torch.bfloat16)) >= 3
    assert (torch.Size([32, 128]), torch.float32) in kept.values()
    assert "1.1 GB for the blocks' inputs, 2.1 GB for the logits" in " ".join((DOCS / "memory.md").read_text().split())
    assert format_bytes(2 * 32 * 4 * 1024 * 4096) == "1.1 GB"
    assert format_bytes(4 * 4 * 1024 * 128256) == "2.1 GB"


def test_figures_of_the_dry_run() -> None:
    memory = memory_of("SmolLM2 135M")
    (text,) = [block for block in blocks(DOCS / "budget.md", "text") if block.startswith("Budget:")]
    limit = memory.estimate(memory.uniform(4, 16), QLORA).total_bytes
    assert f"Budget: {format_bytes(limit)} ({limit:,} bytes, training)" in text
    estimates = [memory.estimate(memory.uniform(bits, 16)) for bits in (2, 3, 4, 8, 16)]
    for name, title in MEMORY_PARTS.items():
        assert re.search(
            rf"^{title}\s+" + r"\s+".join(format_bytes(getattr(e, name)) for e in estimates) + "$", text, re.MULTILINE
        )
    assert [e.total_bytes <= limit for e in estimates] == [True, True, False, False, False]
    assert f"by {(estimates[2].total_bytes - limit) / 1e6:.1f} MB here" in (DOCS / "budget.md").read_text()


def all_errors() -> dict[str, type[AutoQRAError]]:
    for module in pkgutil.walk_packages(peft_autoqra.__path__, "peft_autoqra."):
        if not module.name.endswith("triton_kernels"):  # needs Triton
            importlib.import_module(module.name)

    def subclasses(error: type[AutoQRAError]) -> Iterator[type[AutoQRAError]]:
        yield error
        for child in error.__subclasses__():
            yield from subclasses(child)

    ours = [error for error in subclasses(AutoQRAError) if error.__module__.startswith("peft_autoqra.")]
    return {error.__name__: error for error in ours if not error.__name__.startswith("_")}


def test_every_error_is_explained() -> None:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table_rows("troubleshooting.md")]
    explained = {cells[0].split("`")[1]: cells[1:] for cells in rows if cells[0].startswith("`")}
    assert explained.keys() == all_errors().keys()
    for name, error in all_errors().items():
        base, causes, remedy = explained[name]
        assert base.strip("`") in {parent.__name__ for parent in error.__mro__[1:]}, name
        assert causes, name
        assert remedy, name


def test_quoted_messages_are_ours() -> None:
    sources = "".join(path.read_text() for path in (REPOSITORY / "peft_autoqra").rglob("*.py"))
    sources = re.sub(r'"\s*f?"', "", sources)  # texts that go on in the next line
    quoted = re.findall(r'^\*\*"(.+?)"', prose(DOCS / "troubleshooting.md"), re.MULTILINE | re.DOTALL)
    fragments = {part.strip() for text in quoted for part in " ".join(text.split()).split("...") if part.strip()}
    assert len(fragments) > 5
    foreign = {"Failed to load CPU gemm_4bit_forward from kernels-community"}  # of bitsandbytes
    assert {fragment for fragment in fragments - foreign if fragment not in sources} == set()


# ----------------------------------------------------------------------------------------------------------- what runs
@pytest.fixture
def tiny(tiny_llama: TinyLlamaFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyFolder:
    """A model; the folder that code runs in, with the plan of a search in it."""
    folder = make_tiny_folder(tmp_path, tiny_llama(torch_dtype=torch.float32))
    uniform_plan(tiny_llama(), 3, 4).save_pretrained(tmp_path / "search-out" / "plan")
    monkeypatch.chdir(tmp_path)
    return folder


def run(block: str, tiny: TinyFolder) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(compile(block.replace(MODEL_ID, str(tiny.model)), "docs", "exec"), names)
    return names


def test_memory_page_runs(tiny: TinyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    whole_model, streaming = blocks(DOCS / "memory.md", "python")
    run(whole_model, tiny)
    assert f"`{capsys.readouterr().out.strip()}`" in (DOCS / "memory.md").read_text()
    run(streaming, tiny)
    assert Path("quantized-base", "README.md").exists()


def test_budget_page_runs(tiny: TinyFolder) -> None:
    (block,) = blocks(DOCS / "budget.md", "python")
    assert isinstance(run(block, tiny)["plan"], BitRankPlan)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*:FutureWarning")  # prepare_model_for_kbit_training
@pytest.mark.filterwarnings("ignore:Failed to load CPU gemm_4bit_forward")
def test_from_qlora_page_gives_the_same_model(tiny: TinyFolder) -> None:
    theirs, ours, *others = blocks(DOCS / "from-qlora.md", "python")
    in_float32 = theirs.replace("torch.bfloat16", "torch.float32")  # as the tiny model is
    tokens = torch.arange(24).view(2, 12)
    models = [run(block, tiny)["model"].eval() for block in (in_float32, ours)]
    outputs = [model(tokens).logits for model in models]
    assert isinstance(models[0].config.quantization_config, BitsAndBytesConfig)
    assert torch.equal(*outputs)
    scalings = [model.base_model.model.model.layers[0].mlp.up_proj.scaling for model in models]
    assert scalings[0] == scalings[1] == {"default": 2.0}
    for block in others:
        run(block, tiny)


WITH_EXAMPLE = (peft_autoqra.AutoQRAConfig, BitRankPlan, MemoryModel, uniform_plan, calibrate_plan)


@pytest.mark.parametrize("target", WITH_EXAMPLE, ids=lambda target: target.__name__)
def test_examples_of_docstrings_run(
    target: object, tiny_llama: TinyLlamaFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r" {8}```python\n(.*?) {8}```", target.__doc__ or "", re.DOTALL)
    public = {name: getattr(peft_autoqra, name) for name in peft_autoqra.__all__}
    given = {"base": tiny_llama(), "tokenizer": word_tokenizer(), "texts": ["w1 w2 w3"]}
    source = "\n".join(line.removeprefix(" " * 8) for line in block.splitlines())
    exec(compile(source, "docstring", "exec"), {**public, **given, "get_peft_model": get_peft_model})
