"""A run and its directory: what a discovery leaves behind, written so that it can be read again, here and by other tools.

Every file is written beside its place and moved there, so that it is whole or not there at all. The directory:

- `circuit.safetensors`: a uint8 tensor a level, 1 = kept after closing; `log_alpha.LEVEL` (float32) for learned levels, `score.LEVEL` for
  methods that only score, `whole.LEVEL` where they score heads and MLP blocks as wholes too.
- `circuit.json`, `metrics.json`, `config.yaml`, `history.jsonl`, `report.html`: see docs/files.md.
- `checkpoint.safetensors`, `polishing.safetensors`: what `discover --resume` goes on from.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nodesieve.circuit import Circuit, count_nodes
from nodesieve.config import TARGET_SIZE, DiscoverConfig, make_config
from nodesieve.errors import UserError
from nodesieve.files import read_json, replacing, write_json, write_text
from nodesieve.journal import POLISHING, SCORING, Journal, State
from nodesieve.levels import LEVELS
from nodesieve.nodes import NodeSpace
from nodesieve.scores import Scores
from nodesieve.tasks.base import SPLITS, SplitName, Task, mark_of

FORMAT_VERSION = 1
CIRCUIT, DESCRIPTION, METRICS, CONFIG, HISTORY, REPORT = (
    "circuit.safetensors",
    "circuit.json",
    "metrics.json",
    "config.yaml",
    "history.jsonl",
    "report.html",
)
WHOLE: dict[str, dict[str, type]] = {  # parts without which a file is no run's, and what they are
    DESCRIPTION: {"format_version": int, "model": dict, "task": str, "examples": dict, "thresholds": dict},
    METRICS: {**dict.fromkeys(("nodes", "parameters", "full", "circuit", "ablated", "budget"), dict), "size": float},
}
DIMENSIONS = {"head_dim": 3, "mlp_neuron": 2, "expert": 2, "mlp_output": 2}  # of the tensors that tell the sizes of a model
NAMES = {dict: "a JSON object", str: "a text", int: "a whole number", float: "a number"}
STATES = {SCORING: "checkpoint.safetensors", POLISHING: "polishing.safetensors"}  # there while a run is unfinished
CURVE, STABILITY = "size_curve.json", "stability.json"  # what other commands have measured of it
CONTROLS = "controls-*.json"  # beside it, one for each task, split and ablation
FILES = (CIRCUIT, DESCRIPTION, METRICS, CONFIG, HISTORY, REPORT, *STATES.values(), CURVE, STABILITY)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The result of `discover`.

    Attributes:
        config: the options that it was made with.
        circuit: the binary circuit, closed.
        scores: what selection cut it from; polishing then goes on without them, so it is the circuit's masks that say what is kept.
        threshold: where selection cut.
        metrics: as in `metrics.json`; empty while the run is unfinished.
        history: one entry a logged step.
        description: as in `circuit.json`: model, task, versions, examples used and skipped.
    """

    config: DiscoverConfig
    circuit: Circuit
    scores: Scores
    threshold: float
    metrics: Mapping[str, Any]
    description: Mapping[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def asked(self) -> float | None:
        """The share of leaves that was asked for in place of a KL budget; what runs agree on has a size of its own."""
        return None if "consensus" in self.metrics else self.config.size

    def was_found_on(self, task: Task) -> bool:
        """Is it from where the run's own examples came from, be they others by now?"""
        place = self.description.get("examples", {}).get("place")
        return task.is_from(self.config.task) or (place is not None and place == task.place)

    @cached_property
    def looked_at(self) -> frozenset[str]:
        """Marks of the prompts that the circuit was searched or chosen on, and of those of a run that it is within."""
        return frozenset(self.description.get("examples", {}).get("looked_at", "").split())

    def seen_of(self, task: Task, split: SplitName) -> int:
        """How many examples of a split have a prompt that the circuit was searched or chosen on, as far as the run says: old ones do not."""
        return sum(mark_of(example) in self.looked_at for example in task.splits[split])

    def shares(self, task: Task, split: SplitName) -> bool:
        """Are these the very examples of the run, wherever they come from?"""
        own = self.description.get("examples", {}).get("fingerprints", {})
        return split in own and own[split] == task.fingerprints[split]

    def was_found_in(self, weights: str) -> bool:
        """Is this the fingerprint of the weights that the circuit was found in, as far as the run says?"""
        return weights_of(self.description) in (None, weights)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the run's files into `directory` (made if need be), except the report.

        Raises:
            UserError: `directory` holds another run, or an unfinished one, and `overwrite` is not set; or it cannot be made.
        """
        out = Path(directory)
        there = file_of_a_run(out)
        if there is not None and not overwrite:
            raise UserError(f"{str(directory)!r} already holds a run ({there}); choose another directory, or save with overwrite=True")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"expected a directory that can be made, could not make {str(directory)!r}: {error.strerror}") from error
        for name in (REPORT, CURVE, STABILITY):  # of what was there before
            (out / name).unlink(missing_ok=True)
        kind = "log_alpha" if self.scores.learned else "score"
        nodes = self.circuit.nodes
        tensors = {level: self.circuit.masks[level].to(torch.uint8) for level in nodes.levels}
        levels = [level for level in nodes.levels if level in self.scores.levels]
        tensors |= {f"{kind}.{level}": self.scores.values[level].float() for level in levels}
        tensors |= {f"whole.{level}": value.float() for level, value in (self.scores.wholes or {}).items()}
        with replacing(out / CIRCUIT) as scratch:
            own = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}  # a method may give one tensor two meanings
            scratch.write_bytes(save(own, {"format": "pt"}))  # save_file's are readable by nobody else
        write_json(out / DESCRIPTION, {**self.description, "levels": levels, "thresholds": dict.fromkeys(levels, self.threshold)})
        if self.metrics:
            write_json(out / METRICS, self.metrics)
        else:  # unfinished, and nobody is to take it for more
            (out / METRICS).unlink(missing_ok=True)
        write_config(out, self.config)
        write_text(out / HISTORY, "".join(json.dumps(row) + "\n" for row in self.history))
        if self.metrics:  # finished: nothing is left to go on from
            for name in STATES.values():
                (out / name).unlink(missing_ok=True)


def file_of_a_run(directory: Path) -> str | None:
    """The name of a file there that a run has left, finished or not, if there is one."""
    return next((name for name in (METRICS, DESCRIPTION, *STATES.values(), CONFIG) if (directory / name).exists()), None)


def is_of_a_run(path: Path, directory: Path) -> bool:
    """Is it a file of a run there?"""
    return path.resolve() in {place.resolve() for place in (*(directory / name for name in FILES), *directory.glob(CONTROLS))}


def has_state(directory: Path) -> bool:
    """Is there something that an unfinished run can go on from?"""
    return any((directory / name).is_file() for name in STATES.values())


def is_finished(directory: Path) -> bool:
    """Is there a run with its results and nothing left to go on from?"""
    return (directory / METRICS).is_file() and not has_state(directory)


def resuming(directory: str | Path) -> str:
    """The command that goes on with the run there, as it can be pasted."""
    return f"nodesieve discover --resume {quote(str(directory))}"


def load_run(directory: str | Path) -> Run:
    """Read a run's files back.

    Args:
        directory: what `nodesieve discover --out` or `Run.save` wrote.

    Raises:
        UserError: the directory is not a run, or a file in it cannot be read.
    """
    out = Path(directory)
    if not (out / CIRCUIT).is_file():
        begun = has_state(out) or ((out / CONFIG).is_file() and not is_finished(out))
        hint = f"; it holds an unfinished run: {resuming(out)}" if begun else ""
        raise UserError(f"expected a run's directory with a {CIRCUIT}, found none in {str(directory)!r}{hint}")
    config, description = read_config(out), _whole(out / DESCRIPTION, WHOLE[DESCRIPTION])
    if description["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"expected a run of format {FORMAT_VERSION} or earlier in {str(directory)!r}, got {description['format_version']}; update nodesieve"
        )
    metrics = _whole(out / METRICS, WHOLE[METRICS], or_empty=True) if (out / METRICS).is_file() else {}
    try:
        with safe_open(out / CIRCUIT, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"expected a safetensors file, could not read {str(out / CIRCUIT)!r}: {error}") from error
    missing = [level for level in ("layer", "head_dim", "mlp_output", "embedding") if level not in tensors]
    if missing:
        raise UserError(f"expected a tensor for every level in {str(out / CIRCUIT)!r}, found none for {', '.join(missing)}")
    nodes = _nodes_of(tensors, description, out / CIRCUIT)
    masks = {level: tensors[level].bool() if level in tensors else torch.zeros(nodes.shape(level), dtype=torch.bool) for level in LEVELS}
    learned = any(name.startswith("log_alpha.") for name in tensors)
    kind = "log_alpha" if learned else "score"
    values = {level: tensors.get(f"{kind}.{level}", torch.ones(masks[level].shape)) for level in LEVELS}
    thresholds = description["thresholds"]
    return Run(
        config=config,
        circuit=Circuit.of(masks, nodes),
        scores=Scores(
            values=values,
            nodes=nodes,
            levels=tuple(level for level in nodes.levels if f"{kind}.{level}" in tensors),
            threshold=0.0 if learned else None,
            learned=learned,
            wholes={level: tensors[f"whole.{level}"] for level in LEVELS if f"whole.{level}" in tensors} or None,
        ),
        threshold=next(iter(thresholds.values())),
        metrics=metrics,
        description={key: value for key, value in description.items() if key not in ("levels", "thresholds")},
        history=_history_of(out),
    )


def _whole(path: Path, parts: Mapping[str, type], *, or_empty: bool = False) -> dict[str, Any]:
    """A JSON object with these parts, none of them empty and each of its type, or an empty one."""
    content = read_json(path)
    missing = [part for part in parts if content.get(part) in (None, {}) and (content or not or_empty)]
    if missing:
        raise UserError(f"expected {', '.join(parts)} in {str(path)!r}, found nothing under {', '.join(missing)}")
    for part, kind in parts.items() if content else ():
        if not isinstance(content[part], (int, float) if kind is float else kind):
            raise UserError(f"expected {NAMES[kind]} under {part} in {str(path)!r}, got {content[part]!r}")
    return content


def _history_of(directory: Path) -> list[dict[str, Any]]:
    """Its lines; none where there is no such file."""
    path = directory / HISTORY
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    except ValueError as error:
        raise UserError(f"expected a JSON object a line in {str(path)!r}, got {error}") from error
    others = [row for row in rows if not (isinstance(row, dict) and "step" in row)]
    if others:
        raise UserError(f"expected a JSON object with a step a line in {str(path)!r}, got {str(others[0])[:60]}")
    return rows


def _nodes_of(tensors: Mapping[str, Tensor], description: Mapping[str, Any], path: Path) -> NodeSpace:
    """The sizes of the model that a circuit's tensors are of."""
    routed = description.get("expert_layers", [])
    whole = all(tensor.dim() == DIMENSIONS[level] for level, tensor in tensors.items() if level in DIMENSIONS)
    if not whole or not isinstance(routed, list):
        raise UserError(f"expected a circuit's tensors in {str(path)!r}, got other shapes")
    layers, heads, head_dim = tensors["head_dim"].shape
    nodes = NodeSpace(
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        neurons=tensors["mlp_neuron"].shape[1] if "mlp_neuron" in tensors else 0,
        width=tensors["mlp_output"].shape[1],
        experts=tensors["expert"].shape[1] if "expert" in tensors else 0,
        expert_layers=frozenset(routed),
    )
    for name, tensor in tensors.items():
        level = name.rpartition(".")[2]
        if level in LEVELS and tensor.shape != nodes.shape(level):
            raise UserError(f"expected {name} of {nodes.shape(level)} in {str(path)!r}, got {tuple(tensor.shape)}")
    return nodes


def describe(
    config: DiscoverConfig,
    circuit: Circuit,
    *,
    revision: str | None,
    fingerprint: str,
    within: str | None = None,
    examples: Mapping[str, Any],
    loss: object | None = None,
    complete: bool,
) -> dict[str, Any]:
    """The content of `circuit.json`, less what is known of the scores."""
    return {
        "format_version": FORMAT_VERSION,
        "complete": complete,
        "model": {"id": config.model, "revision": revision, "weights": fingerprint},
        "method": config.method,
        "ablation": config.ablation,
        "task": config.task,
        "seed": config.seed,
        "counts": counted(circuit),
        **({"within": within} if within else {}),
        **({"loss": getattr(loss, "__name__", type(loss).__name__)} if loss else {}),
        **({"expert_layers": sorted(circuit.nodes.expert_layers)} if circuit.nodes.expert_layers else {}),
        "examples": examples,
        "versions": versions(),
    }


def weights_of(description: Mapping[str, Any]) -> str | None:
    """The fingerprint of the weights that a run was made with; the first runs do not say it, or have one of some values only."""
    found: str | None = description["model"].get("weights")
    return found


def counted(circuit: Circuit) -> dict[str, dict[str, int]]:
    """By level, nodes `kept` and in `total`."""
    return {level: {"kept": count.kept, "total": count.total} for level, count in count_nodes(circuit).items()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("nodesieve", "torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def refuse_other_examples(description: Mapping[str, Any], task: Task, splits: Sequence[SplitName] = SPLITS) -> None:
    """Raise UserError where `task`, a run's own, has come to hold other examples in these splits: the circuit may have been found on some of them.

    Args:
        description: the run's.
    """
    own, now = description.get("examples", {}).get("fingerprints", {}), task.fingerprints
    for split in splits:
        if own.get(split, now[split]) != now[split]:
            raise UserError(
                f"expected the {split} examples that the run was made with in {task.source!r}, got others, some of which its circuit may have been "
                "found on; bring them back (the file, the seed and sizes of the data, or the version of nodesieve), or put the new ones alone into "
                "another file"
            )


class RunJournal(Journal):
    """Keeps history and checkpoints in a run's directory.

    A checkpoint holds tensors beside one JSON string of plain numbers; history lines after that of scoring are dropped on resuming, since the
    steps that wrote them are taken again.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.directory = self.scratch = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def save(self, state: State, *, part: str = SCORING) -> None:
        with replacing(self.directory / STATES[part]) as scratch:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
            own = {"passes": asdict(self.passes), "peak_memory_bytes": self.memory.peak(), "devices": self.devices, "of": self.of}
            assert not own.keys() & state.numbers.keys()
            scratch.write_bytes(save(tensors, {"numbers": json.dumps({**state.numbers, **own})}))
        if part == SCORING:  # the others add no lines
            write_text(self.directory / HISTORY, "".join(json.dumps(row) + "\n" for row in self.history))

    def load(self, *, part: str = SCORING) -> State | None:
        path = self.directory / STATES[part]
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["numbers"])
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"expected a checkpoint of nodesieve, could not read {str(path)!r}: {error}; remove it to start anew") from error
        before = numbers.pop("of", {})
        for what in self.of:
            if before.get(what, self.of[what]) != self.of[what]:
                raise UserError(f"expected the {what} that the run in {str(self.directory)!r} began with, got others; begin anew with --overwrite")
        self.passes.raise_to(numbers.pop("passes"))
        self.memory.before = max(self.memory.before, numbers.pop("peak_memory_bytes", 0))
        self.devices = list(dict.fromkeys([*numbers.pop("devices", []), *self.devices]))
        if part != SCORING:
            return State(tensors=tensors, numbers=numbers)
        self.history = [row for row in _history_of(self.directory) if row["step"] <= numbers["step"]]
        return State(tensors=tensors, numbers=numbers)


def _in_a_line(error: Exception) -> str:
    """What is wrong with a file, and where, as far as the error knows."""
    mark = getattr(error, "problem_mark", None)
    return str(error).splitlines()[0] if mark is None else f"in line {mark.line + 1}: {getattr(error, 'problem', None) or error}"


def write_config(directory: Path, config: DiscoverConfig) -> None:
    write_text(directory / CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))


def read_config(directory: str | Path) -> DiscoverConfig:
    """The config of a run's directory, or of a YAML file."""
    path = Path(directory)
    path = path / CONFIG if path.is_dir() else path
    try:
        options = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"expected a config file, could not read {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"expected YAML in {str(path)!r}, got {_in_a_line(error)}") from error
    if not isinstance(options, dict):
        raise UserError(f"expected options by name in {str(path)!r}, got {type(options).__name__}")
    if options.get("controller") != "target_size" and options.get("target_size") == TARGET_SIZE:  # its default was written whatever the controller
        del options["target_size"]
    return make_config(options)
