import numpy as np
import pytest
import torch
from botorch.acquisition.analytic import LogExpectedImprovement

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.search.embedding import OrdinalEmbedding
from peft_autoqra.search.loss_features import LossFeatures
from peft_autoqra.search.proxy_gp import LossData, ProxyGP, log_improvement
from tests.search.synthetic import InteractingTruth, make_problem


def problem_of_ten():
    return make_problem(10, seed=1)


def sample(problem, num, seed=0):
    rng = np.random.default_rng(seed)
    return np.asarray([problem.space.sample(rng) for _ in range(num)])


def truth_of(problem, positions, seed=0):
    truth = InteractingTruth(problem, seed)
    return np.array([truth(problem.space.from_array(position)) for position in positions])


def observed(problem, *, num=12, losses=None, standard_errors=None, levels=None, num_levels=1):
    positions = sample(problem, num)
    losses = truth_of(problem, positions) if losses is None else np.asarray(losses)
    errors = np.full(num, np.nan) if standard_errors is None else np.asarray(standard_errors)
    levels = np.zeros(num, dtype=np.int64) if levels is None else np.asarray(levels)
    return LossData(positions, losses, errors, levels, num_levels)


def fit(problem, data, hyperparameters=None):
    embedding = OrdinalEmbedding(problem, ImportancePriors.from_problem(problem))
    return ProxyGP(embedding, LossFeatures(problem), data, hyperparameters)


def with_cheap(problem, num_top=6, num_cheap=24, num_levels=3, shift=0.7):
    """Few observations at the top; many at the cheapest fidelity, whose losses are shifted and else the same."""
    positions = np.concatenate([sample(problem, num_top), sample(problem, num_cheap, seed=1)])
    losses = truth_of(problem, positions) + shift * (np.arange(num_top + num_cheap) >= num_top)
    levels = np.where(np.arange(len(positions)) < num_top, num_levels - 1, 0)
    return LossData(positions, losses, np.full(len(positions), 0.005), levels, num_levels)


def only(data, chosen):
    return LossData(
        data.positions[chosen],
        data.losses[chosen],
        data.standard_errors[chosen],
        data.levels[chosen],
        data.num_levels,
    )


@pytest.mark.parametrize("standard_errors", [None, np.full(12, 0.01), np.array([np.nan, 0.02] * 6)])
@pytest.mark.parametrize("levels", [None, np.array([2, 0, 2, 1] * 3)])
def test_posterior_and_improvement_equal_those_of_botorch(standard_errors, levels):
    problem = problem_of_ten()
    data = observed(problem, standard_errors=standard_errors, levels=levels, num_levels=1 if levels is None else 3)
    gp, new = fit(problem, data), sample(problem, 20, seed=9)
    unit, offset = gp.scaling.unit[-1], gp.scaling.offset[-1]
    mean, deviation = gp.posterior(new)
    reference = gp.model.posterior(gp._inputs(new))
    np.testing.assert_allclose(mean, reference.mean[:, 0].detach() * unit + offset, rtol=1e-5)
    np.testing.assert_allclose(deviation, reference.variance[:, 0].detach().sqrt() * unit, rtol=1e-3)
    best_loss = data.losses.min()
    acquisition = LogExpectedImprovement(gp.model, best_f=(best_loss - offset) / unit, maximize=False)
    expected = acquisition(gp._inputs(new)[:, None]).detach().numpy() + np.log(unit)
    np.testing.assert_allclose(gp.log_expected_improvement(new, best_loss), expected, rtol=1e-2, atol=1e-3)


def test_predicts_better_than_the_proxy():
    problem = problem_of_ten()
    gp, new = fit(problem, observed(problem, num=30)), sample(problem, 50, seed=5)
    truth, proxy = truth_of(problem, new), [problem.predicted_loss(problem.space.from_array(c)) for c in new]
    assert np.std(truth - gp.posterior(new)[0]) < 0.8 * np.std(truth - proxy)


def test_cheap_observations_teach_about_the_top():
    problem = problem_of_ten()
    data, new = with_cheap(problem), sample(problem, 40, seed=5)
    both = fit(problem, data)
    alone = fit(problem, only(data, data.levels == 2), both.hyperparameters)
    assert both.posterior(new)[1].mean() < 0.8 * alone.posterior(new)[1].mean()
    errors = [np.abs(gp.posterior(new)[0] - truth_of(problem, new)).mean() for gp in (both, alone)]
    assert errors[0] < errors[1]
    assert errors[0] < 0.35  # half of the shift of the cheap losses, which is learned


def test_a_fidelity_without_observations():
    problem = problem_of_ten()
    gp = fit(problem, only(with_cheap(problem), slice(6, None)))
    mean, deviation = gp.posterior(sample(problem, 5, seed=5))
    assert np.isfinite(mean).all()
    assert (deviation > 0).all()


def test_hyperparameters_are_taken_over_as_they_are():
    problem = problem_of_ten()
    data = with_cheap(problem)
    gp = fit(problem, data)
    again = fit(problem, data, gp.hyperparameters)
    new = sample(problem, 5, seed=5)
    assert gp.hyperparameters.keys() == again.hyperparameters.keys()
    assert all(torch.equal(again.hyperparameters[name], value) for name, value in gp.hyperparameters.items())
    np.testing.assert_allclose(again.posterior(new)[0], gp.posterior(new)[0])


def test_believing_makes_candidates_certain_and_moves_nothing():
    problem = problem_of_ten()
    gp, new = fit(problem, observed(problem)), sample(problem, 1, seed=7)
    mean, deviation = gp.posterior(new)
    gp.believe(new)
    assert gp.posterior(new)[0] == pytest.approx(mean, rel=1e-6)
    assert gp.posterior(new)[1] < 0.5 * deviation


def linear_posterior(gp):
    """Mean and covariance of the linear part's weights by the textbook (Rasmussen and Williams 2006, Eq. 2.8)."""
    inputs, targets, noise = gp._conditioned
    columns = inputs[:, gp._linear.start : gp._linear.stop]
    with torch.no_grad():
        covariance = gp.model.covar_module(inputs).to_dense() + torch.diag(noise)
        prior = torch.diag(gp.model.covar_module.kernels[0].deviations.square())
        gain = prior @ columns.T @ torch.linalg.inv(covariance)
        mean = gain @ (targets - gp.model.mean_module(inputs))
        return mean.numpy(), (prior - gain @ columns @ prior).numpy()


def test_corrected_table_is_that_of_the_expected_weights():
    problem = problem_of_ten()
    gp = fit(problem, observed(problem, num=20))
    mean, _ = linear_posterior(gp)
    scale = float(gp.model.mean_module.log_scales[0].detach().exp())
    expected = gp.features.corrected_table(mean, scale, float(gp.scaling.unit[-1]))
    np.testing.assert_allclose(gp.corrected_table(), expected, rtol=1e-6, atol=1e-9)


def test_draws_have_the_mean_and_the_spread_of_the_posterior():
    problem = problem_of_ten()
    gp, rng, num = fit(problem, observed(problem, num=20)), np.random.default_rng(0), 1500
    draws = np.stack([gp.corrected_table(rng) for _ in range(num)])
    mean, covariance = linear_posterior(gp)
    weights = np.random.default_rng(1).multivariate_normal(mean, covariance, size=num, method="eigh")
    tables = np.stack([gp.features.corrected_table(w, 0.0, float(gp.scaling.unit[-1])) for w in weights])
    spread = tables.std(axis=0)
    assert (np.abs(draws.mean(axis=0) - gp.corrected_table()) <= 5 * spread / np.sqrt(num) + 1e-9).all()
    varied = spread > 1e-6
    np.testing.assert_allclose(draws.std(axis=0)[varied], spread[varied], rtol=0.12)


@pytest.mark.parametrize("losses", [[3.0] * 12, [1e30] * 12, [0.0] * 12])
def test_equal_losses_of_any_size_do_not_break_it(losses):
    problem = problem_of_ten()
    data = observed(problem, losses=losses)
    mean, deviation = fit(problem, data).posterior(data.positions)
    assert np.isfinite(mean).all()
    assert np.isfinite(deviation).all()


def test_improvement_is_exact_in_the_tails():
    u = np.array([5.0, 1.0, 0.0, -1.0, -5.0, -30.0, -1e4])
    from_expansion = -0.5 * u[-2:] ** 2 - 0.5 * np.log(2 * np.pi) - 2 * np.log(-u[-2:])
    density, normal = np.exp(-0.5 * u**2) / np.sqrt(2 * np.pi), torch.distributions.Normal(0.0, 1.0)
    direct = np.log(density[:4] + u[:4] * normal.cdf(torch.tensor(u[:4])).numpy())
    np.testing.assert_allclose(log_improvement(u)[:4], direct, rtol=1e-5)
    np.testing.assert_allclose(log_improvement(u)[-2:], from_expansion, rtol=1e-4)


def test_leaves_the_global_generator_alone():
    problem, state = problem_of_ten(), torch.random.get_rng_state()
    fit(problem, observed(problem))
    assert torch.equal(state, torch.random.get_rng_state())
