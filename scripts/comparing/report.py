"""The table and the picture of finished runs."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import yaml
from matplotlib.figure import Figure

from errors import UserError
from files import replacing
from scripts.comparing.recipes import Run


def by_model(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The finished runs of each model, with all seeds."""
    finished = {}
    for run in runs:
        if run.is_finished:
            finished.setdefault(run.model, []).append(run)
    return finished


def best_of_families(models: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Of each model with several values of an argument, the best; means over seeds decide."""
    best = {}
    for model, runs in models.items():
        merit = mean(run.program.merit(run) for run in runs)
        best[runs[0].family] = max(best.get(runs[0].family, (merit, model)), (merit, model))
    return {model: models[model] for _, model in best.values()}


def table(models: dict[str, list[Run]]) -> str:
    """Markdown, a row for each model."""
    first = next(iter(models.values()))
    columns = first[0].program.columns(first)
    lines = ["| model | " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|---|" + "--:|" * len(columns))
    for model, runs in models.items():
        lines.append(f"| {model} | " + " | ".join(column.cell(runs) for column in columns) + " |")
    return "\n".join(lines)


def draw(models: dict[str, list[Run]], title: str) -> Figure:
    figure = Figure(figsize=(8, 3 + 0.3 * len(models)), dpi=120, layout="constrained")
    axes = figure.subplots()
    next(iter(models.values()))[0].program.draw(axes, models)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def report(runs: Sequence[Run], output: Path) -> None:
    """Writes comparison.md and comparison.png. Raises UserError if no run is finished."""
    models = by_model(runs)
    if not models:
        raise UserError(f"{output} holds no finished run of this recipe yet.")
    finished = [run for same in models.values() for run in same]
    facts = yaml.safe_load((finished[0].folder / "args.yaml").read_text(encoding="utf-8"))
    at_once = sorted({lease["at_once"] for run in finished for lease in run.leases})
    first = finished[0]
    conditions = [
        f"- {len(finished)} of {len(runs)} runs, {first.length} {first.unit}",
        f"- {' or '.join(map(str, at_once))} runs at once, which the minutes depend on",
        *(f"- {key}: {facts[key]}" for key in ("device", "torch", "timm", "commit")),
    ]
    best = best_of_families(models)
    parts = ["\n".join(conditions), table(best)]
    if len(best) < len(models):
        parts += ["All of them:", table(models)]
    text = "\n\n".join(parts) + "\n"
    with replacing(output / "comparison.md") as file:
        file.write(text)
    with replacing(output / "comparison.png", "xb") as file:
        draw(best, f"{first.length} {first.unit}; {facts['device']}").savefig(file)
    print(text)
