"""What a tool that stops at heads and MLPs can see: `multigranular` with gates on layers, blocks and heads only."""

from __future__ import annotations

from dataclasses import replace

from nodesieve.config import DiscoverConfig
from nodesieve.journal import Journal
from nodesieve.methods.multigranular import multigranular
from nodesieve.problem import Problem
from nodesieve.scores import Scores


def coarse(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Learn log_alpha for those of `config.levels` that are no finer than heads and MLP blocks."""
    return multigranular(problem, replace(config, levels=config.seen), journal)
