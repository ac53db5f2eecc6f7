"""Tables in Markdown from the study's measurements. Measures nothing itself."""

from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from benchmarks.lib.tables import Row, column, where
from benchmarks.study.mixing import DRAWS, TEMPERATURES, Family, Losses, choose_temperature

Rows = list[Row]


def accuracy(rows: Rows, **wanted: Any) -> float:
    """Return the mean accuracy of the rows that have these values."""
    return mean(column(rows, "accuracy", **wanted))


def tuned_table(family: Family, rows: Rows) -> str:
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

    def means(model: str, task: str) -> list[float]:
        # A single model is measured once, whatever task is looked at; a mix is for one task.
        which = {"experiment": "tuned", "task": task, "model": model}
        if single := {"base": "base", "tuned": task}.get(model):
            which = {"experiment": "single", "task": single, "model": single}
        found = where(rows, **which)
        others = [row for row in found if row["test"] in family.tasks and row["test"] != task]
        rest = [accuracy(found, test=test) for test in family.other_tests]
        return [accuracy(found, test=task), accuracy(others), *rest]

    lines = []
    for model, name in names.items():
        columns = zip(*(means(model, task) for task in family.tasks), strict=True)
        lines.append([name, *(_points(mean(column)) for column in columns)])
    title = f"{family.name}: fine-tunes alone and mixed, means over {len(family.tasks)} tasks"
    return _table(title, ["model", "own task", "other tasks", *family.other_tests], lines)


def new_task_table(family: Family, rows: Rows, losses: Losses) -> str:
    """For each task, without its own model: base, single models, and mixes by five examples."""

    def singles(task: str) -> list[float]:
        found = where(rows, experiment="single", test=task)
        models = {row["model"]: row["accuracy"] for row in found if row["model"] != task}
        lowest = [min(models, key=losses[task, draw].__getitem__) for draw in DRAWS]
        by_loss = mean(models[name] for name in lowest)
        base = models.pop("base")
        return [base, mean(models.values()), max(models.values()), by_loss]

    title = f"{family.name}: a new task, by models of the other tasks"
    header = ["new task", "base", "mean fine-tune", "best fine-tune", "model of lowest loss"]
    return _task_table(family, rows, "new", title, header, singles)


def pool_table(family: Family, rows: Rows) -> str:
    """For each task, with its own model among all others: uniform weights and weights by data."""

    def singles(task: str) -> list[float]:
        found = where(rows, experiment="single", test=task)
        return [accuracy(found, model=model) for model in ("base", task)]

    title = f"{family.name}: a task whose own model is one among all"
    return _task_table(family, rows, "pool", title, ["task", "base", "its fine-tune"], singles)


def _task_table(
    family: Family,
    rows: Rows,
    experiment: str,
    title: str,
    header: list[str],
    singles: Callable[[str], list[float]],
) -> str:
    """Return a table of a line for each task; development tasks are left out of the mean."""
    temperature = choose_temperature(family, rows, experiment)
    mixes = where(rows, experiment=experiment)
    lines, finals = [], []
    for task in (*family.development_tasks, *family.final_tasks):
        draws = column(mixes, "accuracy", task=task, model="data", temperature=temperature)
        cells = [*singles(task), accuracy(mixes, task=task, model="uniform"), mean(draws)]
        in_development = task in family.development_tasks
        name = f"{task} (dev.)" if in_development else task
        lines.append([name, *map(_points, cells), _points(stdev(draws))])
        finals += [] if in_development else [cells]
    means = (_points(mean(cells)) for cells in zip(*finals, strict=True))
    lines.append(["mean, without dev.", *means, ""])
    header += ["uniform", f"by data, T = {temperature:g}", "± by draw"]
    return _table(title, header, lines)


def temperature_table(family: Family, rows: Rows) -> str:
    """For each temperature: accuracy on development tasks, which choose it, and on the rest."""
    chosen = {name: choose_temperature(family, rows, name) for name in ("new", "pool")}
    lines = []
    for temperature in (*TEMPERATURES, None):
        name = "uniform" if temperature is None else f"{temperature:g}"
        cells = []
        for experiment in chosen:
            model = "uniform" if temperature is None else "data"
            what = {"experiment": experiment, "model": model, "temperature": temperature}
            found = where(rows, **what)
            for tasks in (family.development_tasks, family.final_tasks):
                cell = _points(mean(accuracy(found, task=task) for task in tasks))
                cells.append(f"**{cell}**" if chosen[experiment] == temperature else cell)
        lines.append([name, *cells])
    title = f"{family.name}: by temperature (in bold: chosen on development tasks)"
    header = ["temperature", "new, dev.", "new, other tasks", "pool, dev.", "pool, other tasks"]
    return _table(title, header, lines)


def _points(value: float) -> str:
    return f"{value:.1f}"


def _table(title: str, header: list[str], lines: list[list[str]]) -> str:
    align = ["---", *(["---:"] * (len(header) - 1))]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, align, *lines])
    return f"{title}\n\n{body}\n"
