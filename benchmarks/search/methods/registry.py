"""All methods by name."""

from __future__ import annotations

from benchmarks.search.methods.autoqra import autoqra, bits_only, ranks_only
from benchmarks.search.methods.exact_allocation import exact_allocation
from benchmarks.search.methods.nsga2 import nsga2
from benchmarks.search.methods.optuna_samplers import optuna_nsga2, optuna_tpe
from benchmarks.search.methods.paper_two_stages import paper_two_stages
from benchmarks.search.methods.random_search import random_search
from benchmarks.search.methods.turbo import turbo
from benchmarks.search.run import Method

METHODS: dict[str, Method] = {
    "autoqra": autoqra(),
    "random": random_search,
    "allocation": exact_allocation,
    "paper": paper_two_stages,
    "nsga2": nsga2,
    "turbo": turbo,
    "optuna-tpe": optuna_tpe,
    "optuna-nsga2": optuna_nsga2,
}

ABLATIONS: dict[str, Method] = {
    "without-warm-start": autoqra("warm"),
    "without-evolution": autoqra("evolution"),
    "without-trust-region": autoqra("trust_region"),
    "without-surrogate": autoqra("surrogate"),
    "without-fidelities": autoqra("fidelities"),
    "bits-only": autoqra(restrict=bits_only),
    "ranks-only": autoqra(restrict=ranks_only),
}
"""What is left of the search without one of its parts."""
