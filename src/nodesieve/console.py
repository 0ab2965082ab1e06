"""What the command line shows: a progress line while a run goes on, tables when it is done. Drawn by rich; fits narrow terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from nodesieve.metrics import in_figures, in_percent
from nodesieve.report.tables import tables as comparison_tables
from nodesieve.run import RunJournal

if TYPE_CHECKING:
    from nodesieve.architectures import Architecture
    from nodesieve.evaluation import Evaluation, Intervals, Metrics
    from nodesieve.run import Run

ENDS = 8  # parts shown from each end of a list by cost
SPEED_OVER = 300  # seconds of progress that time left goes by: a step may take half a minute
SHOWN_LEVELS = {"head": "heads", "head_dim": "dims", "mlp_neuron": "neurons", "expert": "experts", "mlp_output": "outputs"}


class ConsoleJournal(RunJournal):
    """A run's journal that also shows step, time left, KL and open shares. Where output is no terminal, a line now and then."""

    LINE_EVERY, LINES = 25, 20  # steps at least, and lines at most

    def __init__(self, directory: str | Path, *, quiet: bool = False) -> None:
        super().__init__(directory)
        self._quiet = quiet
        self._console = Console(stderr=True)
        # In a narrow terminal the facts are cut short, not the step and the time left.
        columns = [
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
            TextColumn("{task.description} {task.fields[facts]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        ]
        hidden = quiet or not self._console.is_terminal
        self._bar = Progress(*columns, console=self._console, disable=hidden, speed_estimate_period=SPEED_OVER)
        self._task = self._bar.add_task("loading", total=None, facts="")
        self._kl: float | None = None
        self._step = 0

    def __enter__(self) -> ConsoleJournal:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        super().say(text)
        self._bar.update(self._task, description=text, refresh=True)
        if not self._quiet and not self._console.is_terminal:
            self._console.print(text, highlight=False)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def progress(self, step: int, total: int, **facts: float) -> None:
        shown = []
        if "kl" in facts:
            before = 0.9 ** max(0, step - self._step)  # weight of what was shown for each step since
            self._kl = facts["kl"] if self._kl is None else before * self._kl + (1 - before) * facts["kl"]
            shown.append(f"KL {self._kl:.2f}")
        shown += [f"{name} {100 * facts[level]:.0f}%" for level, name in SHOWN_LEVELS.items() if level in facts]
        text = " ".join(shown)
        if self._bar.tasks[0].total is None:  # the clock of "time left" starts with the first step, not with loading
            self._bar.reset(self._task, total=total, completed=step - 1, facts="")
        self._bar.update(self._task, completed=step, total=total, facts=text)
        every = max(self.LINE_EVERY, total // self.LINES)
        new_line = step // every != self._step // every or step == total
        if not self._quiet and not self._console.is_terminal and new_line:
            left = self._bar.tasks[0].time_remaining
            time_left = f"{in_minutes(left)} left " if left else ""
            self._console.print(f"{step}/{total} {time_left}{text}".rstrip(), highlight=False)
        self._step = step


def in_minutes(seconds: float) -> str:
    """125 -> "2:05"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def print_summary(run: Run) -> None:
    """The table at the end of a run: full model, circuit, everything ablated; nodes by level; parameters, time, memory."""
    console = Console()
    metrics = run.metrics
    columns = [metrics[part]["test"] for part in ("full", "circuit", "ablated")]
    _metrics_table("test data", columns, metrics["intervals"]["test"])
    table = _table("nodes kept")
    for heading in ("level", "kept", "of", "share"):
        table.add_column(heading, justify="left" if heading == "level" else "right")
    for name, part in {**metrics["nodes"], "parameters": metrics["parameters"]}.items():
        table.add_row(name, f"{part['kept']:,}", f"{part['total']:,}", in_percent(part["kept"] / part["total"]))
    _show(table)
    budget, asked = metrics["budget"], run.asked
    verdict = f"KL budget {budget['kl']:g}: {'met' if budget['met'] else 'NOT met'}"
    if asked is not None:
        verdict = f"at most {in_percent(asked)} of the leaves, as asked for: KL {in_figures(metrics['circuit']['validation']['kl'])}"
    if "unpolished" in metrics:
        before = metrics["unpolished"]
        console.print(
            f"polished: {in_percent(metrics['size'])} of the leaves, {in_percent(before['size'])} before, {before['seconds']:.0f} s", highlight=False
        )
    console.print(
        f"{verdict} on validation data (upper end {in_figures(budget['validation_kl_upper'])})\n"
        f"{metrics['steps']} steps, {metrics['seconds']:.0f} s, peak memory {metrics['peak_memory_bytes'] / 1e9:.2f} GB"
        f"{' on ' + metrics['device'] if metrics.get('device') else ''}",
        highlight=False,
    )


def print_evaluation(evaluation: Evaluation, *, split: str, title: str) -> None:
    columns = [evaluation.full[split], evaluation.circuit[split], evaluation.ablated[split]]
    _metrics_table(title, columns, evaluation.intervals[split])


def print_controls(found: Mapping[str, Mapping[str, Any]], *, title: str) -> None:
    """One line a group of other circuits, from `nodesieve.controls.summary`."""
    table = _table(title)
    for heading in ("", "circuits", "KL, mean", "lowest", "highest", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for group, row in found.items():
        remark = f"p = {row['p']:.3f}" if "p" in row else ""
        if "dearest" in row:
            remark = f"dearest: {row['dearest']} ({_added(row['added_by_dearest'])})"
        if "free" in row:
            remark = f"{row['free']} cost {format(row['nothing'], 'g') + ' or less' if row['nothing'] else 'nothing'}"
        numbers = [in_figures(row[name]) for name in ("kl_mean", "kl_min", "kl_max")]
        table.add_row(group.replace("_", " "), str(row["count"]), *numbers, remark)
    _show(table)
    if "minimality" in found:
        _print_costs(found["minimality"]["added"])


def _added(kl: float | None) -> str:
    return "-" if kl is None else f"{kl:+.4f}"


def _print_costs(added: Mapping[str, float | None]) -> None:
    """What each part costs when it is closed alone, from the cheapest to the dearest; the middle of a long list is left to `--json`."""
    table = _table("closed alone, added to the KL")
    for heading in ("part", "KL"):
        table.add_column(heading, justify="right" if heading == "KL" else "left")
    rows = [(name, _added(cost)) for name, cost in added.items()]
    if len(rows) > 2 * ENDS:
        rows[ENDS:-ENDS] = [(f"... {len(rows) - 2 * ENDS} others", "")]
    for row in rows:
        table.add_row(*row)
    _show(table)


def print_size_curve(curve: Mapping[str, Mapping[str, Any]], *, title: str) -> None:
    """From `nodesieve.size_curve`: one line a size, and the areas."""
    for unit, part in curve.items():
        table = _table(f"{title}: {'heads and MLPs' if unit == 'parts' else unit}")
        for heading in ("share", "nodes", "KL", "accuracy", "faithfulness"):
            table.add_column(heading, justify="right")
        for point in part["points"]:
            table.add_row(f"{point['share']:g}", f"{point['nodes']:,}", *(in_figures(point[name]) for name in ("kl", "accuracy", "faithfulness")))
        _show(table)
        Console().print(
            f"CPR {in_figures(part['cpr'])}, CMD {in_figures(part['cmd'])}, smallest share within the KL budget "
            f"{'-' if part['compactness'] is None else format(part['compactness'], 'g')}",
            highlight=False,
        )


def print_agreement(found: Mapping[str, Any], *, title: str) -> None:
    """From the `stability` command: Jaccard indices by level beside chance."""
    table = _table(title)
    for heading in ("level", "Jaccard, mean", "lowest", "highest", "by chance"):
        table.add_column(heading, justify="left" if heading == "level" else "right")
    for level, row in found["levels"].items():
        table.add_row(level, *(f"{row[name]:.2f}" for name in ("jaccard", "lowest", "highest", "chance")))
    _show(table)


def print_comparison(found: Mapping[str, Any], *, title: str) -> None:
    """Two tables from `nodesieve.compare`: a line a method, or a column a method where lines would be too long for the terminal."""
    console = Console()
    console.print(title, highlight=False, markup=False)
    for subject, lines in comparison_tables(found["rows"]).items():
        upright, turned = _grid(subject, lines), _grid(subject, list(zip(*lines, strict=True)))
        _show(upright if _width(upright) <= max(console.width, _width(turned)) else turned)


def _grid(title: str, lines: Sequence[Sequence[str]]) -> Table:
    """The first line heads the columns; the first column is names."""
    table = _table(title)
    for place, heading in enumerate(lines[0]):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _show(table: Table) -> None:
    """Nothing is left out, whatever a narrow terminal makes of it."""
    Console(width=max(Console().width, _width(table))).print(table)


def _width(table: Table) -> int:
    """Columns of a terminal that `table` takes where nothing is cut."""
    return Console(width=10_000).measure(table).maximum


def print_levels(architecture: Architecture, *, title: str) -> None:
    """Levels with their counts and the share of the attention and MLP parameters that hangs on them."""
    import torch

    from nodesieve.circuit import Circuit, count_parameters

    table = _table(title)
    for heading in ("level", "shape", "nodes", "parameters"):
        table.add_column(heading, justify="left" if heading in ("level", "shape") else "right")
    nodes = architecture.nodes
    everything = Circuit.whole(nodes)
    for level in nodes.levels:
        without = Circuit.of({**everything.masks, level: torch.zeros_like(everything.masks[level])}, nodes)
        count = count_parameters(without, architecture)
        share = "" if level == "embedding" else in_percent(1 - count.kept / count.total)
        table.add_row(level, " x ".join(map(str, nodes.shape(level))), f"{nodes.count(level):,}", share)
    _show(table)


def _metrics_table(title: str, columns: list[Metrics], intervals: Intervals) -> None:
    table = _table(title)
    for heading in ("", "full model", "circuit", "95% interval", "all ablated"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in columns[1]:
        full, circuit, ablated = (in_figures(column.get(name)) for column in columns)
        ends = intervals.get(name)
        table.add_row(name, full, circuit, "-" if ends is None else " to ".join(map(in_figures, ends)), ablated)
    _show(table)


def _table(title: str) -> Table:
    """Without lines. The title is shown as it is, whatever brackets are in it."""
    return Table(title=Text(title, style="table.title"), title_justify="left", box=None)
