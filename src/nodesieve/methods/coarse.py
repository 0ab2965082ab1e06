"""What a tool that stops at heads and MLPs can see: `multigranular` with gates on layers, blocks and heads only."""

from __future__ import annotations

from dataclasses import replace

from nodesieve.config import DiscoverConfig
from nodesieve.errors import UserError
from nodesieve.journal import Journal
from nodesieve.methods.multigranular import multigranular
from nodesieve.problem import Problem
from nodesieve.scores import Scores

LEVELS_SEEN = ("layer", "attention_block", "mlp_block", "head")


def coarse(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Learn log_alpha for those of `config.levels` that are no finer than heads and MLP blocks."""
    levels = tuple(level for level in config.levels if level in LEVELS_SEEN)
    if not levels:
        raise UserError(f"--method coarse expects --levels with some of {', '.join(LEVELS_SEEN)}, got {', '.join(config.levels)}")
    return multigranular(problem, replace(config, levels=levels), journal)
