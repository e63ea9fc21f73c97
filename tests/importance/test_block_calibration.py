"""Calibration block by block gives what whole passes give, goes on where it was stopped, reads models from disk."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance import block_calibration, whole_file
from peft_autoqra.importance.activation_store import ActivationStore
from peft_autoqra.importance.block_calibration import BlockCalibration
from peft_autoqra.importance.block_chain import BlockChain
from peft_autoqra.importance.calibration import CalibrationOptions, calibrate
from peft_autoqra.importance.statistics import CalibrationStatistics
from peft_autoqra.target_modules import linear_targets


def batches(num: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 60, (2, 6 + index), generator=generator) for index in range(num)]
    masks = [torch.ones_like(x) for x in ids]
    masks[0][0, -2:] = 0
    return [{"input_ids": x, "attention_mask": mask} for x, mask in zip(ids, masks, strict=True)]


def assert_same(found: CalibrationStatistics, wanted: CalibrationStatistics) -> None:
    assert list(found) == list(wanted)
    for name in wanted:
        assert torch.equal(found[name].input_gram, wanted[name].input_gram), name
        assert torch.equal(found[name].output_gradient_second_moment, wanted[name].output_gradient_second_moment), name
        assert found[name].num_tokens == wanted[name].num_tokens


def batch_by_batch(model, data, names, **options) -> CalibrationStatistics:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockChain, "find", classmethod(lambda *_: None))
        return calibrate(model, data, names, CalibrationOptions(**options))


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=3)


@pytest.fixture
def names(model):
    return list(linear_targets(model))


def opt():
    return OPTForCausalLM(
        OPTConfig(hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
                  max_position_embeddings=32, word_embed_proj_dim=16)
    )  # fmt: skip


def gpt2():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_whole_passes_to_the_last_bit(model, names, dtype):
    model.to(dtype)
    assert BlockChain.find(model, names, batches()[0]) is not None
    assert_same(calibrate(model, batches(), names), batch_by_batch(model, batches(), names))


@pytest.mark.parametrize("make", [opt, gpt2])
def test_equals_whole_passes_on_other_architectures(make):
    model = make().eval()
    names = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    names.remove("lm_head")
    chain = BlockChain.find(model, names, batches()[0])
    assert chain is not None
    assert len(chain.blocks) == 2
    assert_same(calibrate(model, batches(), names), batch_by_batch(model, batches(), names))


def test_the_head_runs_where_its_logits_are_wanted(model, names):
    calls, original = [], model.lm_head.forward
    model.lm_head.forward = lambda hidden: calls.append(hidden) or original(hidden)
    calibrate(model, batches(3), names)
    assert len(calls) == 2 + 3  # two for the check that the model is a chain


def test_modules_of_some_blocks_only(model, names):
    chosen = [name for name in names if ".layers.1." in name]
    assert_same(calibrate(model, batches(), chosen), batch_by_batch(model, batches(), chosen))


def test_a_module_outside_the_blocks_needs_whole_passes(model, names):
    assert BlockChain.find(model, [*names, "lm_head"], batches()[0]) is None
    assert "lm_head" in calibrate(model, batches(), [*names, "lm_head"])


@pytest.mark.parametrize("where", ["before", "after"])
def test_blocks_with_hooks_need_whole_passes(model, names, where):
    if where == "before":
        model.model.layers[0].register_forward_pre_hook(lambda _module, args: (args[0] * 1.5, *args[1:]))
    else:
        model.model.layers[2].register_forward_hook(lambda _module, _args, output: output * 1.5)
    assert BlockChain.find(model, names, batches()[0]) is None
    assert_same(calibrate(model, batches(), names), batch_by_batch(model, batches(), names))


def test_a_head_that_reads_an_early_block_needs_whole_passes(model, names):
    early = []
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, output: early.append(output))
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: original(hidden + early.pop())
    assert BlockChain.find(model, names, batches()[0]) is None
    early.clear()
    assert_same(calibrate(model, batches(), names), batch_by_batch(model, batches(), names))


def test_blocks_that_share_an_object_need_whole_passes(model, names):
    class State:
        x = 0

    for index, block in enumerate(model.model.layers):
        original = block.forward

        def forward(hidden, *args, state=None, original=original, index=index, **kwargs):
            output = original(hidden, *args, **kwargs)
            if index == 0:
                state.x = output
            return output + state.x if index == 2 else output

        block.forward = forward
    model.model.layers[0].register_module("probe", torch.nn.Identity())
    run, state = model.model.forward, State()
    model.model.forward = lambda *args, **kwargs: run(*args, state=state, **kwargs)
    assert BlockChain.find(model, names, batches()[0]) is None
    assert_same(calibrate(model, batches(), names), batch_by_batch(model, batches(), names))


def test_a_model_that_wants_more_of_its_blocks_needs_whole_passes():
    """Router logits, which a stand-in for a block does not make."""
    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    names = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"]
    assert BlockChain.find(model, names, batches()[0]) is None
    assert_same(calibrate(model, batches(), names), batch_by_batch(model, batches(), names))


def test_modules_that_are_blocks_themselves(model, names):
    model.extra = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    with pytest.raises(CalibrationError, match=r"never reached 'extra.0'"):
        calibrate(model, batches(), ["extra.0"])


def test_a_directory_changes_nothing_and_is_read_the_next_time(model, names, tmp_path, monkeypatch):
    options = CalibrationOptions(directory=tmp_path)
    first = calibrate(model, batches(), names, options)
    assert_same(first, calibrate(model, batches(), names))
    assert not list(tmp_path.glob("*/activations"))
    monkeypatch.setattr(BlockCalibration, "run", lambda *_args, **_kwargs: pytest.fail("measured again"))
    assert_same(calibrate(model, batches(), names, options), first)
    loaded = calibrate(model, batches(), names, options)
    assert len({id(loaded[f"model.layers.0.self_attn.{x}_proj"].input_gram) for x in "qkv"}) == 1


@pytest.mark.parametrize("change", ["weight", "norm", "rope", "attention", "data", "mask", "seed", "modules"])
def test_another_calibration_is_not_taken_for_this_one(model, names, tmp_path, change):
    first = calibrate(model, batches(), names, CalibrationOptions(directory=tmp_path))
    data, seed = batches(), 0
    if change == "weight":
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight.mul_(2)
    elif change == "norm":
        model.model.layers[1].input_layernorm.weight.data.mul_(2)
    elif change == "rope":
        model.model.rotary_emb.inv_freq.mul_(0.5)
    elif change == "attention":
        model.config._attn_implementation = "eager"
    elif change == "data":
        data = batches(2)
    elif change == "mask":
        data[1]["attention_mask"][0, 0] = 0
    elif change == "seed":
        seed = 1
    else:
        names = names[:-1]
    second = calibrate(model, data, names, CalibrationOptions(directory=tmp_path, seed=seed))
    assert second.fingerprint != first.fingerprint
    assert_same(second, calibrate(model, data, names, CalibrationOptions(seed=seed)))


@pytest.mark.parametrize("after", range(8))
def test_goes_on_where_it_was_stopped(model, names, tmp_path, monkeypatch, after):
    """Stopped before each of the writes; nothing that is done already is done again."""
    wanted, options = calibrate(model, batches(), names), CalibrationOptions(directory=tmp_path)
    original, writes = block_calibration.ActivationStore.put, []

    def put(self, name, tensors):
        if len(writes) == after:
            raise KeyboardInterrupt
        writes.append(name)
        original(self, name, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(block_calibration.ActivationStore, "put", put)
        try:
            calibrate(model, batches(), names, options)
        except KeyboardInterrupt:
            pass
        else:
            pytest.fail("it was not stopped")
    first_writes, after = list(writes), -1
    writes.clear()
    monkeypatch.setattr(block_calibration.ActivationStore, "put", put)
    assert_same(calibrate(model, batches(), names, options), wanted)
    assert [*first_writes, *writes] == [*(f"hidden.{i}" for i in range(4)), *(f"gradient.{3 - i}" for i in range(4))][
        : len(first_writes) + len(writes)
    ]


def test_a_model_on_disk_is_read_block_by_block(model, names, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    in_memory = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={"model.layers": "disk", **dict.fromkeys(in_memory, "cpu")},
        offload_folder=tmp_path / "offload",
    )
    assert {parameter.device.type for parameter in offloaded.model.layers.parameters()} == {"meta"}
    assert BlockChain.find(offloaded, names, batches()[0]) is not None
    reads, original = [], OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(
        OffloadedWeightsLoader, "__getitem__", lambda self, key: (reads.append(key), original(self, key))[1]
    )
    found, counts = {}, {}
    for num in (1, 6):
        reads.clear()
        found[num] = calibrate(offloaded, batches(num), names)
        counts[num] = reads.count("model.layers.1.mlp.up_proj.weight")
    assert counts[1] == counts[6] <= 4  # once for its hash, once to find the chain, once forward and once back
    assert_same(found[6], calibrate(model, batches(6), names))
    assert {parameter.device.type for parameter in offloaded.model.layers.parameters()} == {"meta"}


def test_wide_inputs_get_the_diagonal(model, names):
    whole = calibrate(model, batches(), names)
    wide = calibrate(model, batches(), names, CalibrationOptions(max_gram_features=64))
    for name in names:
        if name.endswith("down_proj"):
            assert torch.allclose(wide[name].input_gram, whole[name].input_gram.diagonal(), rtol=1e-5)
            assert torch.equal(wide[name].input_second_moment, wide[name].input_gram)
        else:
            assert torch.equal(wide[name].input_gram, whole[name].input_gram)


def test_a_block_that_is_not_finite_without_a_targeted_module_is_named(model, names):
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(torch.inf)
    with pytest.raises(CalibrationError, match=r"outputs of 'model.layers.1' hold NaN"):
        calibrate(model, batches(), [name for name in names if ".layers.0." in name])


@pytest.mark.parametrize("batch", [[1], {}, {"input_ids": torch.ones(3)}, {"input_ids": [[1, 2]]}])
def test_refuses_batches_of_another_form(model, names, batch):
    with pytest.raises(CalibrationError, match="must be a mapping with `input_ids`"):
        calibrate(model, [batch], names)


@pytest.mark.parametrize("key", ["labels", "attention_mask"])
def test_refuses_labels_and_masks_of_another_shape(model, names, key):
    with pytest.raises(CalibrationError, match=rf"{key} has shape \(2, 3\), input_ids \(2, 4\)"):
        calibrate(model, [{"input_ids": torch.ones(2, 4, dtype=torch.long), key: torch.ones(2, 3)}], names)


def test_a_head_that_is_not_finite_is_named(model, names):
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="predictions hold NaN or infinity"):
        calibrate(model, batches(), names)


def test_a_file_in_the_place_of_the_directory(model, names, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="is a file; name a folder"):
        CalibrationOptions(directory=tmp_path / "file")


def test_damaged_activations_are_given_up_and_the_next_run_heals(model, names, tmp_path, monkeypatch):
    wanted, options = calibrate(model, batches(), names), CalibrationOptions(directory=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(BlockCalibration, "_head", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, batches(), names, options)
    for path in tmp_path.glob("*/activations/*"):
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CalibrationError, match=r"is damaged.*run the same again"):
        calibrate(model, batches(), names, options)
    assert_same(calibrate(model, batches(), names, options), wanted)


def test_a_full_disk_is_an_error_that_names_the_file(model, names, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(whole_file, "save_file", full)
    with pytest.raises(CalibrationError, match=r"hidden.0.safetensors cannot be written \(No space left"):
        calibrate(model, batches(), names, CalibrationOptions(directory=tmp_path))


def test_what_a_killed_process_left_is_removed(model, names, tmp_path, monkeypatch):
    options = CalibrationOptions(directory=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "clear", lambda _: None)
        calibrate(model, batches(), names, options)
    assert list(tmp_path.glob("*/activations/*"))
    calibrate(model, batches(), names, options)
    assert not list(tmp_path.glob("*/activations"))


def test_two_processes_share_a_directory(model, names, tmp_path):
    with ThreadPoolExecutor(2) as pool:  # a lock of files stands between threads as between processes
        models = [copy.deepcopy(model) for _ in range(2)]
        options = CalibrationOptions(directory=tmp_path)
        both = list(pool.map(lambda one: calibrate(one, batches(), names, options), models))
    for found in both:
        assert_same(found, calibrate(model, batches(), names))
