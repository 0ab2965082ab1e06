"""One file a method, all behind one door: (problem, config, journal) -> Scores. To add a method, add a file and a row here."""

from __future__ import annotations

from collections.abc import Callable

from nodesieve.config import DiscoverConfig
from nodesieve.journal import Journal
from nodesieve.methods.coarse import coarse
from nodesieve.methods.fisher import fisher
from nodesieve.methods.gradients import gate_gradient, gate_gradient_ig, uniform_gradient
from nodesieve.methods.greedy import greedy
from nodesieve.methods.hybrid import hybrid
from nodesieve.methods.multigranular import multigranular
from nodesieve.methods.nested import nested
from nodesieve.methods.plain import activation_difference, random, weight_magnitude
from nodesieve.methods.sieve import sieve
from nodesieve.problem import Problem
from nodesieve.scores import Scores

Method = Callable[[Problem, DiscoverConfig, Journal], Scores]

METHODS: dict[str, Method] = {
    "hybrid": hybrid,
    "sieve": sieve,
    "multigranular": multigranular,
    "nested": nested,
    "coarse": coarse,
    "greedy": greedy,
    "fisher": fisher,
    "gate_gradient": gate_gradient,
    "gate_gradient_ig": gate_gradient_ig,
    "uniform_gradient": uniform_gradient,
    "activation_difference": activation_difference,
    "weight_magnitude": weight_magnitude,
    "random": random,
}
