"""Tables in Markdown from the study's measurements. Measures nothing itself."""

from __future__ import annotations

from statistics import mean, stdev

from study_mixing import DRAWS, TEMPERATURES, Family, Losses, Row

DEFAULT_TEMPERATURE = TEMPERATURES[-1]


def tuned_table(family: Family, rows: list[Row], temperature: float) -> str:
    """For each fine-tune: accuracy on its own task and on all other tests, alone and mixed."""
    lines = []
    for task in family.tasks:
        cells = [
            mean(cell)
            for model in ("base", task, "half", "data")
            for cell in _own_and_others(family, rows, task, model)
        ]
        lines.append((task, cells))
    lines.append(
        ("mean", [mean(column) for column in zip(*(cells for _, cells in lines), strict=True)])
    )
    title = f"{family.name}: a fine-tune, and mixes of it, on its own task and on all others"
    mixes = ("base", "fine-tuned", "half base", f"by data, T = {temperature:g}")
    header = ["task", *(f"{mix}: {where}" for mix in mixes for where in ("own", "others"))]
    return _table(title, header, [[name, *map(_points, cells)] for name, cells in lines])


def temperature_table(family: Family, rows: list[Row], temperature: float) -> str:
    """For each temperature: mean accuracy on new tasks, those of development and the rest."""
    groups = (family.development_tasks, _final_tasks(family))
    lines = [
        [
            f"**{each:g}**" if each == temperature else f"{each:g}",
            *(
                _points(mean(acc for task in group for acc in _by_data(rows, task, each)))
                for group in groups
            ),
        ]
        for each in TEMPERATURES
    ]
    uniform = ["uniform"]
    uniform += [_points(mean(_single(rows, "new", t, "uniform", t) for t in g)) for g in groups]
    title = f"{family.name}: new tasks by temperature (in bold: best on development tasks)"
    return _table(title, ["temperature", "development", "other tasks"], [*lines, uniform])


def new_task_table(family: Family, rows: list[Row], losses: Losses, temperature: float) -> str:
    """For each task, without its own model: base, single models, and mixes by five examples."""
    lines, finals = [], []
    for task in (*family.development_tasks, *_final_tasks(family)):
        models = {
            name: _single(rows, "single", task, name, task)
            for name in family.folders
            if name != task
        }
        tuned = [accuracy for name, accuracy in models.items() if name != "base"]
        lowest = [min(losses[task, draw], key=losses[task, draw].__getitem__) for draw in DRAWS]
        by_data = _by_data(rows, task, temperature)
        cells = [
            models["base"],
            mean(tuned),
            max(tuned),
            mean(models[name] for name in lowest),
            _single(rows, "new", task, "uniform", task),
            mean(_by_data(rows, task, DEFAULT_TEMPERATURE)),
            mean(by_data),
        ]
        mark = " (dev.)" if task in family.development_tasks else ""
        spread = f"{cells[-1]:.1f} ± {stdev(by_data):.1f}"
        lines.append([task + mark, *map(_points, cells[:-1]), spread])
        if not mark:
            finals.append(cells)
    lines.append(
        ["mean, without dev.", *(_points(mean(column)) for column in zip(*finals, strict=True))]
    )
    title = f"{family.name}: a new task, by models of the other tasks"
    header = [
        "new task",
        "base",
        "singles, mean",
        "best single, known only afterwards",
        "single of lowest loss",
        "uniform",
        f"by data, T = {DEFAULT_TEMPERATURE:g}",
        f"by data, T = {temperature:g}",
    ]
    return _table(title, header, lines)


def _final_tasks(family: Family) -> tuple[str, ...]:
    return tuple(task for task in family.tasks if task not in family.development_tasks)


def _own_and_others(
    family: Family, rows: list[Row], task: str, model: str
) -> tuple[list[float], list[float]]:
    """Return accuracies on the task and on all other tests; of several draws, all of them."""
    # A single model is measured once, whatever task is looked at; a mix is for one task.
    mix = ("single", model) if model in family.folders else ("tuned", task)
    found = [row for row in rows if (row.experiment, row.task) == mix and row.model == model]
    own = [row.accuracy for row in found if row.test == task]
    return own, [row.accuracy for row in found if row.test != task]


def _by_data(rows: list[Row], task: str, temperature: float) -> list[float]:
    """Return the accuracies on a new task, a draw each."""
    return [
        row.accuracy
        for row in rows
        if (row.experiment, row.model, row.task) == ("new", "data", task)
        and row.temperature == temperature
    ]


def _single(rows: list[Row], experiment: str, task: str, model: str, test: str) -> float:
    """Return the one accuracy of a model, or of a mix that no draw decides."""
    (accuracy,) = (
        row.accuracy
        for row in rows
        if (row.experiment, row.model, row.test) == (experiment, model, test)
        and (experiment == "single" or row.task == task)
    )
    return accuracy


def _points(value: float) -> str:
    return f"{value:.1f}"


def _table(title: str, header: list[str], lines: list[list[str]]) -> str:
    align = ["---", *(["---:"] * (len(header) - 1))]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, align, *lines])
    return f"{title}\n\n{body}\n"
