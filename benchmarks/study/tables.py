"""Tables in Markdown from the study's measurements. Measures nothing itself."""

from __future__ import annotations

from statistics import mean, stdev

from benchmarks.study.mixing import DRAWS, TEMPERATURES, Family, Losses, Row, choose_temperature


def tuned_table(family: Family, rows: list[Row]) -> str:
    """Fine-tunes alone and mixed: accuracy on their own task, on other tasks, on other tests.

    Means over all tasks; of several draws, over these too.
    """
    temperature = choose_temperature(family, rows, "new")
    names = {
        "base": "base",
        "tuned": "fine-tuned",
        "half": "half fine-tuned, half base",
        "data": f"half fine-tuned, half all others by data (T = {temperature:g})",
    }
    lines = []
    for model, name in names.items():
        columns: list[list[float]] = [[] for _ in range(2 + len(family.other_tests))]
        for task in family.tasks:
            found = _rows_for(rows, task, task if model == "tuned" else model, family)
            other_tasks = [row for row in found if row.test in family.tasks and row.test != task]
            columns[0].append(mean(row.accuracy for row in found if row.test == task))
            columns[1].append(mean(row.accuracy for row in other_tasks))
            for column, test in zip(columns[2:], family.other_tests, strict=True):
                column.append(mean(row.accuracy for row in found if row.test == test))
        lines.append([name, *(_points(mean(column)) for column in columns)])
    title = f"{family.name}: fine-tunes alone and mixed, means over {len(family.tasks)} tasks"
    return _table(title, ["model", "own task", "other tasks", *family.other_tests], lines)


def temperature_table(family: Family, rows: list[Row]) -> str:
    """For each temperature: accuracy on development tasks, which choose it, and on the rest."""
    columns = [
        (experiment, tasks)
        for experiment in ("new", "pool")
        for tasks in (family.development_tasks, _final_tasks(family))
    ]
    lines = []
    for temperature in TEMPERATURES:
        cells = []
        for experiment, tasks in columns:
            accuracies = [_by_data(rows, experiment, task, temperature) for task in tasks]
            cell = _points(mean(map(mean, accuracies)))
            chosen = choose_temperature(family, rows, experiment) == temperature
            cells.append(f"**{cell}**" if chosen else cell)
        lines.append([f"{temperature:g}", *cells])
    uniform = [
        _points(mean(_only(rows, experiment, task, "uniform", task) for task in tasks))
        for experiment, tasks in columns
    ]
    title = f"{family.name}: by temperature (in bold: chosen on development tasks)"
    header = ["temperature", "new, dev.", "new, other tasks", "pool, dev.", "pool, other tasks"]
    return _table(title, header, [*lines, ["uniform", *uniform]])


def new_task_table(family: Family, rows: list[Row], losses: Losses) -> str:
    """For each task, without its own model: base, single models, and mixes by five examples."""
    temperature = choose_temperature(family, rows, "new")
    lines, finals = [], []
    for task in (*family.development_tasks, *_final_tasks(family)):
        models = {
            name: _only(rows, "single", name, name, task) for name in family.folders if name != task
        }
        tuned = [accuracy for name, accuracy in models.items() if name != "base"]
        lowest = [min(models, key=losses[task, draw].__getitem__) for draw in DRAWS]
        by_data = _by_data(rows, "new", task, temperature)
        cells = [
            models["base"],
            mean(tuned),
            max(tuned),
            mean(models[name] for name in lowest),
            _only(rows, "new", task, "uniform", task),
            mean(by_data),
        ]
        in_development = task in family.development_tasks
        name = f"{task} (dev.)" if in_development else task
        lines.append([name, *map(_points, cells), _points(stdev(by_data))])
        if not in_development:
            finals.append(cells)
    columns = zip(*finals, strict=True)
    lines.append(["mean, without dev.", *(_points(mean(column)) for column in columns), ""])
    title = f"{family.name}: a new task, by models of the other tasks"
    header = [
        "new task",
        "base",
        "mean fine-tune",
        "best fine-tune",
        "model of lowest loss",
        "uniform",
        f"by data, T = {temperature:g}",
        "± by draw",
    ]
    return _table(title, header, lines)


def pool_table(family: Family, rows: list[Row]) -> str:
    """For each task, with its own model among all others: uniform weights and weights by data."""
    temperature = choose_temperature(family, rows, "pool")
    lines, finals = [], []
    for task in (*family.development_tasks, *_final_tasks(family)):
        by_data = _by_data(rows, "pool", task, temperature)
        cells = [
            _only(rows, "single", "base", "base", task),
            _only(rows, "single", task, task, task),
            _only(rows, "pool", task, "uniform", task),
            mean(by_data),
        ]
        in_development = task in family.development_tasks
        name = f"{task} (dev.)" if in_development else task
        lines.append([name, *map(_points, cells), _points(stdev(by_data))])
        if not in_development:
            finals.append(cells)
    columns = zip(*finals, strict=True)
    lines.append(["mean, without dev.", *(_points(mean(column)) for column in columns), ""])
    title = f"{family.name}: a task whose own model is one among all"
    header = ["task", "base", "its fine-tune", "uniform", f"by data, T = {temperature:g}"]
    return _table(title, [*header, "± by draw"], lines)


def _final_tasks(family: Family) -> tuple[str, ...]:
    return tuple(task for task in family.tasks if task not in family.development_tasks)


def _rows_for(rows: list[Row], task: str, model: str, family: Family) -> list[Row]:
    """Return all measurements of a single model, or of the mix of that name for the task."""
    # A single model is measured once, whatever task is looked at; a mix is for one task.
    mix = ("single", model) if model in family.folders else ("tuned", task)
    return [row for row in rows if (row.experiment, row.task) == mix and row.model == model]


def _by_data(rows: list[Row], experiment: str, task: str, temperature: float) -> list[float]:
    """Return the accuracies of mixes by data, a draw each."""
    mix = (experiment, task, "data", temperature)
    return [
        row.accuracy
        for row in rows
        if (row.experiment, row.task, row.model, row.temperature) == mix
    ]


def _only(rows: list[Row], experiment: str, task: str, model: str, test: str) -> float:
    """Return the one accuracy of a single model, or of a mix that no draw decides."""
    wanted = (experiment, task, model, test)
    (accuracy,) = (
        row.accuracy for row in rows if (row.experiment, row.task, row.model, row.test) == wanted
    )
    return accuracy


def _points(value: float) -> str:
    return f"{value:.1f}"


def _table(title: str, header: list[str], lines: list[list[str]]) -> str:
    align = ["---", *(["---:"] * (len(header) - 1))]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, align, *lines])
    return f"{title}\n\n{body}\n"
