"""Every option of a run, with its default and its meaning: the one place from which flags, `config.yaml` and checks are made.

Imports no torch, so that `nodesieve --help` is quick. A run is repeated by `nodesieve discover --config DIR/config.yaml`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, Literal, TypeVar, get_args

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from nodesieve.errors import UserError
from nodesieve.levels import DEFAULT_LEVELS, LEAVES, LEVELS
from nodesieve.method_rows import METHOD_ROWS, PER_LEVEL, READ, MethodName, MethodRow, PerLevel, method_for

_T = TypeVar("_T")
ControllerName = Literal["kl_budget", "fixed", "target_size"]
AblationName = Literal["counterfactual", "mean", "zero"]
DtypeName = Literal["float32", "bfloat16", "float16"]
EXTRA_METRICS = ("prob_diff", "cutoff_sharpness")

FINE_BUDGET = 0.02  # nats: below this, what bfloat16 rounds away matters; SmolLM2's own KL from its copy is 0.001 to 0.002
TRAIN_SIZE, VALIDATION_SIZE, REDRAWS = 512, 512, 15  # of built-in tasks
LEAST = {"seed": 0, "train_size": 2, "validation_size": 2, "redraws": 0}
DRAWN = ("train_size", "validation_size", "redraws")
SEEDS = 2**31  # seeds are below this
DRAWS = 100  # random circuits of each kind, beside which `evaluate --controls` sets one
TARGET_SIZE = 0.1  # of controller target_size, where no size is given


def _by_what_is_given(cls: type[_T]) -> type[_T]:
    """What the class refuses becomes a UserError, the first of it in one line; and where no method is given, what is given says which."""
    check = cls.__init__

    @functools.wraps(check)
    def init(self: _T, *arguments: Any, **options: Any) -> None:
        try:
            check(self, *arguments, **{"method": method_for(options), **options})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "options"
            message = first["msg"].removeprefix("Value error, ")
            came = "" if first["type"] == "value_error" else f", got {first['input']!r}"  # our own messages say it themselves
            raise UserError(f"option {name}: {message[0].lower() + message[1:]}{came}" if first["loc"] else message) from error

    cls.__init__ = init  # type: ignore[assignment, method-assign]
    return cls


@_by_what_is_given
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class DiscoverConfig:
    """Options of `discover`. A number a level is given for the levels that differ from the default, e.g. `{"head": 1.0}`."""

    # What to look at
    model: str = Field(default="smollm2-135m", description="smollm2-135m, a hub id, a local directory or a .gguf file")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    task: str = Field(default="ioi", description="a built-in task (see `nodesieve tasks`) or a file of prompts")
    train_size: int = Field(default=TRAIN_SIZE, ge=LEAST["train_size"], description="training examples of a built-in task")
    validation_size: int = Field(default=VALIDATION_SIZE, ge=LEAST["validation_size"], description="validation examples of a built-in task")
    redraws: int = Field(
        default=REDRAWS, ge=LEAST["redraws"], description="further training examples, with other words, for each of a built-in task's"
    )
    unequal: Literal["skip", "error"] = Field(default="skip", description="pairs of prompts of different token length, under counterfactual")
    bootstrap: bool = Field(default=False, description="resample the training examples with replacement, by the seed")
    only_correct: bool = Field(default=False, description="keep the examples that the full model gets right, in every split")
    answer_tokens: Literal["first", "all"] = Field(default="first", description="score an answer by its first token, or by each of its tokens")
    chat_template: bool = Field(default=False, description="give prompts as a user's turn of the tokenizer's chat template")
    padding_side: Literal["left", "right"] = Field(default="left", description="where shorter prompts of a batch are padded")
    metrics: tuple[str, ...] = Field(default=(), description="further metrics, beside the task's own: prob_diff, cutoff_sharpness")
    force: bool = Field(
        default=False, description="go on where the full model is near chance on the task, or where closing every node is within the budget"
    )
    seed: int = Field(default=0, ge=LEAST["seed"], lt=SEEDS, description="seeds the data, the batches and the gate noise")
    data_seed: int | None = Field(default=None, ge=LEAST["seed"], lt=SEEDS, description="seed of the data, where it is to be another one")
    device: str = Field(
        default="auto", description="torch device; auto takes an NVIDIA or AMD GPU if there is one (mps, Apple's, has not been tested)"
    )
    dtype: DtypeName = Field(default="float32", description="dtype of the frozen model; gates are always float32")

    # What to find
    method: Literal["auto"] | MethodName = Field(
        default="auto",
        description="how nodes are scored; auto: sieve, or multigranular where an option is set that only learned gates have, such as --controller, "
        "or hybrid where --gates-share is",
    )
    ablation: AblationName = Field(default="counterfactual", description="what a closed node holds")
    levels: tuple[str, ...] = Field(default=DEFAULT_LEVELS, description="levels that get gates")
    within: str | None = Field(
        default=None, description="a run's directory; only nodes that its circuit keeps are looked at (hybrid, sieve, multigranular)"
    )
    kl_budget: float = Field(default=0.25, gt=0, description="largest KL(full || circuit) on validation data, in nats")
    keep: float | None = Field(default=None, gt=0, le=1, description="share of leaves to keep, instead of the KL budget")
    polish: bool | None = Field(
        default=None,
        description="afterwards close, coarse to fine, what the circuit can do without within the budget; by default unless keep or controller "
        "target_size asks for a size",
    )

    # How to search (hybrid, sieve, multigranular, nested), and to learn gates (hybrid, multigranular)
    steps: int = Field(default=480, ge=1, description="steps: batches of training examples")
    gates_share: float = Field(
        default=0.6, ge=0, lt=1, description="share of the steps of method hybrid in which gates are learned; rounds of the sieve follow"
    )
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="time for scoring and polishing (sieve alone), whose rounds are planned to fit, so the circuit depends on the machine",
    )
    batch_size: int = Field(default=16, ge=1, description="examples a step")
    controller: ControllerName = Field(default="kl_budget", description="who sets the weight of the penalties")
    target_size: float | None = Field(
        default=None, gt=0, le=1, description=f"share of leaves that controller target_size steers to, and that is kept; {TARGET_SIZE:g} if not given"
    )
    gate_samples: Literal["example", "batch"] = Field(default="example", description="one gate sample an example, or one a batch (the paper's form)")
    estimator: Literal["mixed", "pathwise", "straight_through"] = Field(
        default="mixed",
        description="gradient of a gate's sample: pathwise (as the paper), straight through the clipping, or mixed (that for nodes without children)",
    )
    penalty_form: Literal["own", "nested", "reached"] = Field(
        default="own", description="pay for a node's own probability (as the paper), times its ancestors' (nested), or theirs held constant"
    )
    penalties: PerLevel = Field(
        default_factory=dict,
        description="lambda of each level, before the controller's multiplier; for rounds of the sieve, what all nodes of a level are worth "
        "together; the default is the method's own, here the sieve's",
    )
    lambda_init: float = Field(default=1.3, gt=0, description="the controller's multiplier at the start; all of it under controller fixed")
    learning_rates: PerLevel = Field(default_factory=dict, description="Adam's learning rate of each level's log_alpha")
    learning_rate_final: float = Field(default=0.15, ge=0, le=1, description="learning rates at the last step, as a share of those at the start")
    log_alpha_init: PerLevel = Field(default_factory=dict, description="where each level's log_alpha starts")
    log_alpha_spread: PerLevel = Field(default_factory=dict, description="how far below it the level's node of lowest Fisher information starts")
    warmup_steps: int = Field(default=20, ge=0, description="steps over which the penalties rise from 0")
    repair_share: float = Field(default=0.1, ge=0, lt=1, description="share of the steps, at the end, that only lower the KL")
    task_weight: float = Field(default=0.0, ge=0, description="weight of relu(task_margin - logit difference) in the loss")
    task_margin: float = Field(default=3.0, description="logit difference above which the task term is 0")
    learning_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description=f"dtype of the copy that gates are learned on; auto: bfloat16 where the machine has it and kl_budget is {FINE_BUDGET:g} or more, "
        "else dtype; measuring is always in dtype",
    )
    drop_below: float = Field(
        default=0.0, description="every 20 steps, nodes whose log_alpha is below this are dropped for the rest of the run; -10: none ever is"
    )
    memory: Literal["default", "low"] = Field(
        default="default", description="low: compute each layer again in the backward pass instead of keeping what it needs there"
    )
    cache_limit: float = Field(
        default=8.0,
        ge=0,
        description="gigabytes of disk, during the run, for what the model says and holds on examples that come again",
    )
    validate_every: int = Field(default=40, ge=1, description="steps between looks at the binary circuit's validation KL")

    @field_validator("levels", mode="before")
    @classmethod
    def _known_levels(cls, value: Any) -> Any:
        names = names_in(value)
        unknown = [name for name in names if name not in LEVELS]
        if unknown or not names or len(set(names)) < len(names):
            raise ValueError(f"expected different names from {', '.join(LEVELS)}, got {', '.join(names) or 'none'}")
        return tuple(level for level in LEVELS if level in names)

    @field_validator("metrics", mode="before")
    @classmethod
    def _known_metrics(cls, value: Any) -> Any:
        names = names_in(value) if value else ()
        unknown = [name for name in names if name not in EXTRA_METRICS]
        if unknown:
            raise ValueError(f"expected metrics among {', '.join(EXTRA_METRICS)}, got {', '.join(unknown)}")
        return names

    @field_validator("method", mode="before")
    @classmethod
    def _known_method(cls, value: Any) -> Any:
        if value not in ("auto", *METHOD_ROWS):
            raise ValueError(f"expected auto or one of {', '.join(METHOD_ROWS)}, got {value!r}")
        return value

    @field_validator(*PER_LEVEL, mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        unknown = [name for name in value if name not in LEVELS] if isinstance(value, Mapping) else []
        if unknown:
            raise ValueError(f"expected level names ({', '.join(LEVELS)}), got {', '.join(unknown)}")
        return value

    @model_validator(mode="after")
    def _settle(self) -> DiscoverConfig:
        if self.method == "auto":
            object.__setattr__(self, "method", method_for(_set(self)))
        row = self.row
        if self.within is not None and not row.inside:
            inside = [name for name, other in METHOD_ROWS.items() if other.inside]
            raise ValueError(f"within expects method {', '.join(inside)}, got {self.method}")
        if not set(row.sees) & set(self.levels):
            raise ValueError(f"method {self.method} expects levels with some of {', '.join(row.sees)}, got {', '.join(self.levels)}")
        if self.max_minutes is not None and not row.planned:
            planned = [name for name, other in METHOD_ROWS.items() if other.planned]
            raise ValueError(f"max_minutes expects method {', '.join(planned)}, which can plan for it, got {self.method}; set steps instead")
        if self.controller != "target_size" and self.target_size is not None:
            raise ValueError(f"target_size expects controller target_size, got {self.controller}; for a size by any method, use keep")
        if self.controller == "target_size" and self.target_size is None and row.steered:
            object.__setattr__(self, "target_size", TARGET_SIZE if self.keep is None else self.keep)
        if self.size is not None and self.keep is None and not {*LEAVES} & {*row.sees} & {*self.levels}:
            got = ", ".join(self.levels) if {*LEAVES} & {*row.sees} else f"method {self.method}"
            raise ValueError(
                f"controller target_size steers the share of {', '.join(LEAVES)} and expects gates on some of them, got {got}; for a size by wholes, "
                "use keep"
            )
        if self.polish and self.size is not None:
            raise ValueError(
                "polish closes nodes within the KL budget; keep and controller target_size ask for a size: expected one or the other, got both; "
                "add --no-polish"
            )
        if self.polish is None:
            object.__setattr__(self, "polish", self.size is None)
        for name, usual in {**PER_LEVEL, "penalties": row.penalties}.items():
            object.__setattr__(self, name, {**usual, **getattr(self, name)})
        for name in ("penalties", "learning_rates"):
            below = [f"{level}={rate:g}" for level, rate in getattr(self, name).items() if rate < 0]
            if below:
                raise ValueError(f"{name} expects numbers of at least 0, got {', '.join(below)}")
        return self

    @property
    def row(self) -> MethodRow:
        """What options mean to the method."""
        assert self.method != "auto"
        return METHOD_ROWS[self.method]

    @property
    def seen(self) -> tuple[str, ...]:
        """Of `levels` those that the method looks at."""
        return tuple(level for level in self.levels if level in self.row.sees)

    @property
    def needs(self) -> dict[str, str]:
        """Parts of an example that cannot be missing, and what needs them."""
        distractors = {"distractors": "--task-weight"} if self.task_weight and "task_weight" in self.row.reads else {}
        return {**distractors, **dict.fromkeys(self.row.needs, f"method {self.method}")}

    @property
    def size(self) -> float | None:
        """The share of leaves to keep, where that is asked for instead of the KL budget."""
        steered = self.controller == "target_size" and self.row.steered
        return self.target_size if self.keep is None and steered else self.keep

    def with_method(self, method: MethodName, *, seed: int) -> DiscoverConfig:
        """The same options for another method, with its own penalties where these are at the defaults.

        Raises:
            UserError: the method does not take one of the options.
        """
        return self.changed({"method": method, "seed": seed})

    def changed(self, options: Mapping[str, Any]) -> DiscoverConfig:
        """The same options but for some; those that follow from others and were not set to anything else follow from the new ones. Of an option that
        has a number a level, the levels that are not given stay.

        Raises:
            UserError: an option is unknown or does not fit the others.
        """
        own = self.to_dict()
        own["penalties"] = {level: x for level, x in self.penalties.items() if x != self.row.penalties[level]}
        if options.get("controller", self.controller) != "target_size" or self.target_size == (self.keep or TARGET_SIZE):
            own["target_size"] = None
        if self.polish == (self.size is None):
            own["polish"] = None
        if options.get("model", self.model) != self.model:
            own["revision"] = None
        per_level = {name: {**own[name], **options[name]} for name in (*PER_LEVEL, "penalties") if isinstance(options.get(name), Mapping)}
        return make_config({**own, **options, **per_level})

    @property
    def unread(self) -> tuple[str, ...]:
        """Options that are set though the method takes no notice of them."""
        return tuple(name for name in _set(self) if name not in self.row.reads)

    @property
    def drawn(self) -> tuple[str, ...]:
        """Options that are set and say how many examples of a built-in task are drawn."""
        return tuple(_set(self, DRAWN))

    @property
    def seed_of_data(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the order of the fields, as `config.yaml` holds it."""
        return {**asdict(self), "levels": list(self.levels), "metrics": list(self.metrics)}


def names_in(value: Any) -> tuple[str, ...]:
    """Names in a list, or in a string with commas between them."""
    if not isinstance(value, str | list | tuple):
        raise ValueError(f"expected a list of names, got {value!r}")
    return tuple(name.strip() for name in (value.split(",") if isinstance(value, str) else map(str, value)))


def _set(config: DiscoverConfig, names: Collection[str] = READ) -> Iterator[str]:
    """Those of the options that are not at their default."""
    for field in fields(DiscoverConfig):
        if field.name in names:
            usual, value = PER_LEVEL.get(field.name, default_of(field)), getattr(config, field.name)
            if ({**usual, **value} if field.name in PER_LEVEL else value) != usual:
                yield field.name


def default_of(field: Any) -> Any:
    """What an option, one of `fields(DiscoverConfig)`, is where it is not given; of numbers a level, nothing."""
    return field.default.get_default(call_default_factory=True)  # pydantic's FieldInfo


def make_config(options: Mapping[str, Any]) -> DiscoverConfig:
    """Options by name -> a checked config.

    Raises:
        UserError: an unknown option or a value that does not fit, in one line.
    """
    known = [field.name for field in fields(DiscoverConfig)]
    for name in options:
        if name not in known:
            raise UserError(f"expected options among {', '.join(known)}; got {name!r}")
    return DiscoverConfig(**options)


def choices(annotation: Any) -> tuple[str, ...]:
    """The strings that a Literal field, or a union of several, allows; () for any other."""
    values = [value for part in get_args(annotation) for value in get_args(part) or (part,)]
    return tuple(value for value in values if isinstance(value, str))
