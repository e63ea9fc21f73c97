import numpy as np
import pytest
import torch
from botorch.acquisition.analytic import LogExpectedImprovement

from peft_autoqra.importance.priors import ImportancePriors
from peft_autoqra.search.embedding import OrdinalEmbedding
from peft_autoqra.search.proxy_gp import ProxyGP, log_improvement
from tests.search.synthetic import InteractingTruth, make_problem


def fitted(losses=None, standard_errors=None, num=12, **problem_arguments):
    problem = make_problem(10, seed=1, **problem_arguments)
    rng = np.random.default_rng(0)
    candidates = [problem.space.sample(rng) for _ in range(num)]
    positions = np.asarray(candidates)
    truth = InteractingTruth(problem)
    losses = np.array([truth(c) for c in candidates]) if losses is None else np.asarray(losses)
    errors = np.full(num, np.nan) if standard_errors is None else np.asarray(standard_errors)
    embedding = OrdinalEmbedding(problem, ImportancePriors.from_problem(problem))
    return problem, ProxyGP(embedding, positions, losses, errors), positions, losses


@pytest.mark.parametrize("standard_errors", [None, np.full(12, 0.01), np.array([np.nan, 0.02] * 6)])
def test_posterior_and_improvement_equal_those_of_botorch(standard_errors):
    problem, gp, _, losses = fitted(standard_errors=standard_errors)
    rng = np.random.default_rng(9)
    new = np.asarray([problem.space.sample(rng) for _ in range(20)])
    mean, deviation = gp.posterior(new)
    reference = gp.model.posterior(gp._inputs(new))
    np.testing.assert_allclose(mean, reference.mean[:, 0].detach() * gp.scaling.unit + gp.scaling.offset, rtol=1e-5)
    np.testing.assert_allclose(deviation, reference.variance[:, 0].detach().sqrt() * gp.scaling.unit, rtol=1e-3)
    best = (losses.min() - gp.scaling.offset) / gp.scaling.unit
    acquisition = LogExpectedImprovement(gp.model, best_f=best, maximize=False)
    expected = acquisition(gp._inputs(new)[:, None]).detach().numpy() + np.log(gp.scaling.unit)
    np.testing.assert_allclose(gp.log_expected_improvement(new, losses.min()), expected, rtol=1e-2, atol=1e-3)


def test_predicts_better_than_the_proxy():
    problem, gp, _, _ = fitted(num=30)
    rng = np.random.default_rng(5)
    new = [problem.space.sample(rng) for _ in range(50)]
    truth = np.array([InteractingTruth(problem)(c) for c in new])
    proxy = np.array([problem.predicted_loss(c) for c in new])
    residual = np.std(truth - gp.posterior(np.asarray(new))[0])
    assert residual < 0.8 * np.std(truth - proxy)


def test_believing_makes_candidates_certain_and_moves_nothing():
    problem, gp, _, _ = fitted()
    new = np.asarray([problem.space.sample(np.random.default_rng(7))])
    mean, deviation = gp.posterior(new)
    gp.believe(new)
    assert gp.posterior(new)[0] == pytest.approx(mean, rel=1e-6)
    assert gp.posterior(new)[1] < 0.5 * deviation


@pytest.mark.parametrize("losses", [[3.0] * 12, [1e30] * 12, [0.0] * 12])
def test_equal_losses_of_any_size_do_not_break_it(losses):
    _, gp, positions, _ = fitted(losses=losses)
    mean, deviation = gp.posterior(positions)
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
    state = torch.random.get_rng_state()
    fitted()
    assert torch.equal(state, torch.random.get_rng_state())
