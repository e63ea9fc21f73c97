from itertools import accumulate

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from peft_autoqra.errors import CalibrationError
from peft_autoqra.importance.calibration import CalibrationOptions, calibrate, linear_weights
from peft_autoqra.importance.calibration_batch import sample_tokens

LAYER = "model.layers.1"
ATTENTION = [f"{LAYER}.self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down")]
NAMES = ATTENTION + MLP


@pytest.fixture
def model(tiny_llama):
    return tiny_llama()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def drawn(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """The first token of each row at which the summed probabilities reach a random number, ``[rows]``."""
    levels = 1 - torch.rand(len(logits), generator=torch.Generator().manual_seed(seed))
    rows = logits.detach().double().softmax(-1).tolist()
    pairs = zip(rows, levels.tolist(), strict=True)
    return torch.tensor([next(i for i, p in enumerate(accumulate(row)) if p >= level) for row, level in pairs])


def test_grams_are_mean_outer_products_of_the_inputs(model):
    batches = [{"input_ids": tokens(2, 7)}, {"input_ids": tokens(3, 5, seed=1)}]
    statistics = calibrate(model, batches, NAMES)

    seen = {name: [] for name in NAMES}
    for name in NAMES:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0].detach().flatten(0, 1))
        )
    for batch in batches:
        model(**batch)
    for name in NAMES:
        x = torch.cat(seen[name]).double()
        assert statistics[name].num_tokens == len(x) == 29
        assert close(statistics[name].input_gram, x.T @ x / len(x))


def test_modules_with_one_input_share_one_gram(model):
    statistics = calibrate(model, [{"input_ids": tokens(2, 7)}], NAMES)
    grams = [id(statistics[name].input_gram) for name in NAMES]
    q, k, v, o, gate, up, down = grams
    assert q == k == v
    assert gate == up
    assert len({q, o, gate, down}) == 4


def test_gradients_are_those_of_sampled_tokens_per_prediction(model):
    ids = tokens(2, 9)
    statistics = calibrate(model, [{"input_ids": ids}], NAMES, CalibrationOptions(seed=3))

    name, kept = MLP[2], []
    model.get_submodule(name).register_forward_hook(lambda _module, _args, output: kept.append(output))
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    sampled = drawn(logits, seed=3)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, sampled, reduction="sum"), kept[0])
    expected = gradient.flatten(0, 1).double().square().sum(0) / len(sampled)
    assert close(statistics[name].output_gradient_second_moment, expected)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    probabilities = torch.tensor([0.0, 0.1, 0.6, 0.0, 0.3, 0.0])
    tokens = sample_tokens(probabilities.repeat(20_000, 1), torch.Generator().manual_seed(0))
    frequencies = torch.bincount(tokens.flatten(), minlength=6) / 20_000
    assert frequencies[probabilities == 0].tolist() == [0, 0, 0]
    assert torch.allclose(frequencies, probabilities, atol=0.01)  # three standard deviations


def test_predicts_the_divergence_of_a_small_change(tiny_llama):
    """The estimate against KL(before || after) for random noise on one weight: an average over many tokens."""
    model, ids = tiny_llama(vocab_size=32, initializer_range=0.2), tokens(64, 16) % 32
    name = f"{LAYER}.mlp.up_proj"
    statistics = calibrate(model, [{"input_ids": ids}], [name])[name]
    weight = model.get_submodule(name).weight
    noise = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        weight.add_(noise)
        after = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    quadratic = (noise @ statistics.input_gram * noise).sum(1)
    predicted = (statistics.output_gradient_second_moment * quadratic).sum() / 2
    assert float(predicted) == pytest.approx(float(divergence), rel=0.3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(model, side):
    ids = tokens(1, 8)
    padding = torch.full((1, 3), 2)
    pieces, zero = ((padding, ids), (3, 0)) if side == "left" else ((ids, padding), (0, 3))
    batch = {
        "input_ids": torch.cat(pieces, 1),
        "attention_mask": functional.pad(torch.ones(1, 8, dtype=torch.long), zero),
    }
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    padded, plain = (calibrate(model, [b], NAMES) for b in (batch, {"input_ids": ids}))
    for name in NAMES:
        assert padded[name].num_tokens == 8
        assert close(padded[name].input_gram, plain[name].input_gram)
        assert close(
            padded[name].output_gradient_second_moment, plain[name].output_gradient_second_moment, tolerance=1e-3
        )


def test_ignored_labels_are_not_predicted(model):
    ids, labels = tokens(1, 8), torch.full((1, 8), -100)
    labels[0, 4] = ids[0, 4]
    statistics = calibrate(model, [{"input_ids": ids, "labels": labels}], NAMES)

    kept = []
    model.get_submodule(ATTENTION[0]).register_forward_hook(lambda _module, _args, output: kept.append(output))
    logits = model(input_ids=ids).logits[0, 3]
    (sampled,) = drawn(logits[None], seed=0)
    (gradient,) = torch.autograd.grad(-logits.log_softmax(-1)[sampled].sum(), kept[0])
    assert close(statistics[ATTENTION[0]].output_gradient_second_moment, gradient[0].square().sum(0))
    assert statistics[ATTENTION[0]].num_tokens == 8


def test_other_entries_of_a_batch_go_to_the_model_as_they_are(model):
    """TRL's padding-free collator adds the length of the longest text as an integer."""
    ids = tokens(1, 8)
    plain, packed = (calibrate(model, [{"input_ids": ids} | extra], NAMES) for extra in ({}, {"max_length_q": 8}))
    assert torch.equal(plain[NAMES[0]].input_gram, packed[NAMES[0]].input_gram)


def test_same_seed_same_statistics(model):
    first, second = (
        calibrate(model, [{"input_ids": tokens(2, 9)}], NAMES, CalibrationOptions(seed=1)) for _ in range(2)
    )
    for name in NAMES:
        assert torch.equal(first[name].output_gradient_second_moment, second[name].output_gradient_second_moment)


def state(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [parameter.grad for parameter in model.parameters()],
        model.config.use_cache,
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("breaks", [False, True])
def test_model_is_left_as_it_was(model, breaks):
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    batches = [{"input_ids": tokens(2, 7)}]
    if breaks:
        with pytest.raises(IndexError):
            calibrate(model, [*batches, {"input_ids": torch.full((1, 4), 1000)}], NAMES)
    else:
        calibrate(model, batches, NAMES)
    assert state(model) == before


def test_works_inside_no_grad(model):
    with torch.no_grad():
        assert len(calibrate(model, [{"input_ids": tokens(2, 7)}], NAMES)) == len(NAMES)


def test_bfloat16_is_summed_in_float32(model):
    reference = calibrate(model, [{"input_ids": tokens(4, 16)}], NAMES)
    statistics = calibrate(model.bfloat16(), [{"input_ids": tokens(4, 16)}], NAMES)
    for name in NAMES:
        assert statistics[name].input_gram.dtype == torch.float32
        assert statistics[name].output_gradient_second_moment.dtype == torch.float32
        assert close(statistics[name].input_gram, reference[name].input_gram, tolerance=0.05)


def test_conv1d_is_seen_as_out_by_in():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    name = "transformer.h.0.mlp.c_fc"
    statistics = calibrate(model, [{"input_ids": tokens(2, 8) % 64}], [name])[name]
    ((weight_name, weight),) = linear_weights(model, [name])
    assert weight_name == name
    assert weight.shape == (64, 16)
    assert statistics.input_gram.shape == (16, 16)
    assert statistics.output_gradient_second_moment.shape == (64,)


def test_zero_inputs_are_legal(model):
    torch.nn.init.zeros_(model.get_submodule(f"{LAYER}.mlp.up_proj").weight)
    statistics = calibrate(model, [{"input_ids": tokens(2, 7)}], MLP)
    assert not statistics[MLP[2]].input_gram.any()


def test_names_the_first_module_that_is_not_finite(model):
    with torch.no_grad():
        model.get_submodule(MLP[1]).weight[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=f"outputs of '{MLP[1]}' hold NaN or infinity"):
        calibrate(model, [{"input_ids": tokens(2, 7)}], NAMES)


@pytest.mark.parametrize(
    "batches",
    [[], [{"input_ids": torch.full((2, 1), 5)}], [{"input_ids": tokens(1, 4), "labels": torch.full((1, 4), -100)}]],
)
def test_refuses_data_without_predictions(model, batches):
    with pytest.raises(CalibrationError, match="no token to predict"):
        calibrate(model, batches, NAMES)


def test_refuses_unknown_and_non_linear_modules(model):
    with pytest.raises(CalibrationError, match=f"no module .*Close names: .*{MLP[0]}"):
        calibrate(model, [], [MLP[0] + "x"])
    with pytest.raises(CalibrationError, match="LlamaMLP cannot be calibrated"):
        calibrate(model, [], [f"{LAYER}.mlp"])
    with pytest.raises(CalibrationError, match="target_modules"):
        calibrate(model, [], [])
    with pytest.raises(CalibrationError, match="Embedding"):
        calibrate(model, [], ["model.embed_tokens"])


def test_names_a_module_that_the_data_never_reached(model):
    model.add_module("unused", torch.nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match="data never reached 'unused'"):
        calibrate(model, [{"input_ids": tokens(2, 7)}], [*NAMES, "unused"])


def test_names_a_module_that_no_gradient_reached(model):
    name = f"{LAYER}.self_attn.o_proj"
    model.get_submodule(name).register_forward_hook(lambda _module, _args, output: output.detach())
    with pytest.raises(CalibrationError, match=f"gradients never reached '{name}'"):
        calibrate(model, [{"input_ids": tokens(2, 7)}], [name])
