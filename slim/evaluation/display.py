"""Show the results of a task as a table in the terminal and as a figure, for all commands and pages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shards.reporting import html
from slim.evaluation import metrics
from slim.evaluation.results import OURS, Estimate, TaskResult

_WIDTH = 130  # number of characters per line in log files
_OTHERS = (html.ORANGE, html.GREEN, html.PURPLE, html.SKY, html.GREY, html.INK)  # colours of curves beside ours


def words_of(method: str) -> str:
    """The name of a method for display."""
    return method.replace("_", " ")


def percent(share: float) -> str:
    """A few-shot share for display."""
    return f"{100 * share:g} %"


def print_table(result: TaskResult, title: str, compared: bool = True) -> None:
    """Print a row for each method and a column for each metric.

    Parameters
    ----------
    result : TaskResult
    title : str
    compared : bool
        Whether to print few-shot shares, our scores at each site, paired differences and chance levels, if known.
    """
    names, facts = result.metrics, result.facts
    table = Table(title=title, title_justify="left")
    for column in ("method", *names):
        table.add_column(words_of(column), no_wrap=True)
    for method, mine in result.estimates.items():
        table.add_row(words_of(method), *[_cell(mine.get(metric)) for metric in names])
    if compared:
        if facts.sites:
            table.add_section()
        for site, of_site in facts.sites.items():
            mine = of_site.estimates.get(OURS, {})
            table.add_row(escape(f"ours, {site} ({of_site.people})"), *[_cell(mine.get(metric)) for metric in names])
        for share in facts.shares:
            table.add_section()
            for method, mine in share.estimates.items():
                name = f"{words_of(method)}, {percent(share.share)}"
                table.add_row(name, *[_cell(mine.get(metric)) for metric in names])
        table.add_section()
        for method, mine in facts.differences.items():
            table.add_row(f"ours - {method}", *[_cell(mine.get(metric)) for metric in names])
        if facts.chance is not None:
            levels = [facts.chance.get(metric) for metric in names]
            table.add_row("chance", *["n/a" if level is None else f"{level:.3f}" for level in levels])
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table)


def _cell(found: Estimate | None) -> str:
    if found is None:
        return "n/a"
    value, low, high = ("n/a" if one is None else f"{one:.3f}" for one in (found.value, found.low, found.high))
    return rf"{value} \[{low}, {high}]"


def forest(result: TaskResult, label: Callable[[str], str] = words_of, ours: Collection[str] = (OURS,)) -> Figure:
    """A figure with a panel for each metric, and a point with interval for each method. Dashed: chance, if known.

    Parameters
    ----------
    result : TaskResult
    label : callable
        Returns the name of a method for display.
    ours : collection of str
        Methods to highlight by colour.
    """
    names, levels, count = result.metrics, result.levels, len(result.estimates)
    figure = Figure(figsize=(min(11, 2.6 + 2.7 * len(names)), 0.9 + 0.34 * count))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", wspace=0.06)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, names, strict=True):
        for place, method in enumerate(result.estimates):
            found = result.estimate(method, metric)
            if found is None or found.value is None:
                continue
            colour = html.BLUE if method in ours else html.GREY
            if found.interval is not None:
                axes.plot(found.interval, [place, place], color=colour, lw=2.5)
            axes.plot(found.value, place, "o", color=colour, ms=7, mec="white")
        if metric in levels:
            axes.axvline(levels[metric], color=html.RED, lw=1, ls="--")
        axes.set(title=metrics.words(metric), ylim=(count - 0.5, -0.5))
        axes.set_yticks(range(count), [label(method) for method in result.estimates])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    return figure


def save_forest(result: TaskResult, path: Path) -> None:
    """Save the figure as a PNG, with a title."""
    about = f"{result.facts.test_subjects} test subjects, {result.facts.pooling} pooling"
    _save(forest, result, about, path)


def _save(draw: Callable[[TaskResult], Figure], result: TaskResult, about: str, path: Path) -> None:
    """Save a figure of a result as a PNG, with a title that says what it is about."""
    chance = metrics.caption("dashed", result.metrics, result.levels)
    with html.drawing():
        figure = draw(result)
        title = f"{result.name}: {about}, 95 % intervals over subjects{'; ' if chance else ''}{chance}"
        figure.suptitle(title, fontsize=9)
        figure.savefig(path, dpi=130)


def share_curves(result: TaskResult, label: Callable[[str], str] = words_of) -> Figure:
    """A figure with a panel for each metric, and a curve over the few-shot shares for each method, with intervals.

    Parameters
    ----------
    result : TaskResult
        With shares.
    label : callable
        Returns the name of a method for display.
    """
    shares, names = result.facts.shares, result.metrics
    figure = Figure(figsize=(min(14, 2.2 + 3 * len(names)), 3.2))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", wspace=0.06)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    rest = [method for method in result.estimates if method != OURS]
    colours = {OURS: html.BLUE} | {method: _OTHERS[at % len(_OTHERS)] for at, method in enumerate(rest)}
    for axes, metric in zip(panels, names, strict=True):
        for place, method in enumerate(result.estimates):
            found = [one.estimates.get(method, {}).get(metric) for one in shares[:-1]]
            found.append(result.estimate(method, metric))
            known = [
                (one.share * 1.02**place, mine)  # intervals beside each other
                for one, mine in zip(shares, found, strict=True)
                if mine is not None and mine.value is not None
            ]
            look = {"color": colours[method], "lw": 2 if method == OURS else 1.2}
            for at, mine in known:
                if mine.interval is not None:
                    axes.plot([at, at], mine.interval, alpha=0.5, **look)
            axes.plot(
                [at for at, _ in known], [mine.value for _, mine in known], "o-", ms=4, label=label(method), **look
            )
        if metric in result.levels:
            axes.axhline(result.levels[metric], color=html.RED, lw=1, ls="--")
        axes.set(title=metrics.words(metric), xscale="log")
        axes.set_xticks([one.share for one in shares], [f"{percent(one.share)}\n{one.people}" for one in shares])
        axes.minorticks_off()
        axes.grid(axis="y")
    panels[0].set_xlabel("training people")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def save_shares(result: TaskResult, path: Path) -> None:
    """Save the curves of the few-shot shares as a PNG; without shares, remove an earlier one."""
    if not result.facts.shares:
        path.unlink(missing_ok=True)
        return
    about = f"shares of the training people, the same {result.facts.test_subjects} test subjects"
    _save(share_curves, result, about, path)
