"""All methods by name."""

from __future__ import annotations

from benchmarks.search.methods.exact_allocation import exact_allocation
from benchmarks.search.methods.random_search import random_search
from benchmarks.search.run import Method

METHODS: dict[str, Method] = {
    "random": random_search,
    "allocation": exact_allocation,
}
