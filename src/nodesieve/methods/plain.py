"""Baselines that take no gradient: what is found without asking what a node does to the answer.

- `random`: a number drawn for each node.
- `weight_magnitude`: the norm of the weights that carry a node into the residual stream: its column of the projection, its row for an MLP output,
  the whole down projection for an expert.
- `activation_difference`: how far clean and corrupted prompts differ there, mean |x - a| over training examples and tokens, times that norm (an MLP
  output is in the stream already).

Nodes without children are scored; what lies above them gets the highest score among its descendants. As wholes, heads and MLP blocks are scored by
the sum over their leaves, or drawn a number too. The embedding has a score of `random` alone: the others' of it would not compare.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from nodesieve.ablations import Routed
from nodesieve.architectures import as_linear
from nodesieve.config import DiscoverConfig
from nodesieve.errors import UserError
from nodesieve.journal import Journal
from nodesieve.levels import CHILDLESS, LEVELS, measured
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem
from nodesieve.scores import Scores, raise_ancestors, sums_of_leaves

EXAMPLES = 512


def random(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    generator = torch.Generator().manual_seed(config.seed)
    values = {level: torch.rand(problem.nodes.shape(level), generator=generator) for level in LEVELS}
    drawn = _scores(problem, config, {level: x if level in CHILDLESS else torch.zeros_like(x) for level, x in values.items()})
    return replace(drawn, wholes={level: values[level] for level in ("head", "mlp_block")})


def weight_magnitude(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    return _scores(problem, config, _norms(problem))


@torch.no_grad()
def activation_difference(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    train, nodes, model = problem.task["train"], problem.nodes, problem.model
    total = {level: torch.zeros(nodes.shape(level), device=model.device) for level in LEVELS}
    tokens = done = 0
    for batch in train.batches(config.batch_size, first=EXAMPLES):
        assert batch.corrupted is not None
        clean, corrupted = model.record(batch.clean), model.record(batch.corrupted)
        same = batch.clean.attention_mask.shape == batch.corrupted.attention_mask.shape
        if not same or not torch.equal(batch.clean.attention_mask, batch.corrupted.attention_mask):
            raise UserError("--method activation_difference expects clean and corrupted prompts of the same number of tokens")
        real = batch.clean.attention_mask.bool()
        tokens += int(real.sum())
        for level, place in (("head_dim", "heads"), ("mlp_neuron", "neurons"), ("mlp_output", "mlp_write")):
            for layer, x in getattr(clean, place).items():
                total[level][layer] += (x - getattr(corrupted, place)[layer])[real].abs().float().sum(0).reshape(total[level][layer].shape)
        for layer, routed in clean.experts.items():
            other = corrupted.experts[layer]
            assert isinstance(routed, Routed)
            assert isinstance(other, Routed)
            total["expert"][layer] += (routed.dense() - other.dense())[real].abs().float().sum((0, -1))
        done += len(batch.answers)
        journal.progress(done, min(EXAMPLES, len(train)))
        journal.heed()
    weights = {**_norms(problem), "mlp_output": torch.ones(nodes.shape("mlp_output")), "expert": torch.ones(nodes.shape("expert"))}
    return _scores(problem, config, {level: value.cpu() / tokens * weights[level] for level, value in total.items()})


def _norms(problem: Problem) -> LevelTensors:
    """The norm of the weights that carry each node without children into the stream, 0 above."""
    nodes = problem.nodes
    norms = {level: torch.zeros(nodes.shape(level)) for level in LEVELS}
    for layer, places in enumerate(problem.model.architecture.places):
        norms["head_dim"][layer] = _on_cpu(places.attention_projection).norm(dim=0).reshape(nodes.heads, nodes.head_dim)
        if places.mlp_projection is not None:
            weight = _on_cpu(places.mlp_projection)
            norms["mlp_neuron"][layer], norms["mlp_output"][layer] = weight.norm(dim=0), weight.norm(dim=1)
        if places.experts is not None:
            stacked = places.experts.get_parameter("down_proj").detach().float().cpu()  # (E, D, I)
            norms["expert"][layer], norms["mlp_output"][layer] = stacked.flatten(1).norm(dim=1), stacked.transpose(0, 1).flatten(1).norm(dim=1)
    return norms


def _on_cpu(projection: nn.Module) -> Tensor:
    """Its weight, (outputs, inputs), in float32."""
    return as_linear(projection).detach().float().cpu()


def _scores(problem: Problem, config: DiscoverConfig, values: LevelTensors) -> Scores:
    absent = {level: ~problem.nodes.present(level) for level in LEVELS}
    seen = measured(config.levels, problem.nodes.levels)
    values = {level: value.masked_fill(absent[level], 0.0) if level in seen else torch.zeros_like(value) for level, value in values.items()}
    return Scores(values=raise_ancestors(values), nodes=problem.nodes, levels=config.seen, wholes=sums_of_leaves(values))
