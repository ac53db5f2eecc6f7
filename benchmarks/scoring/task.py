"""The examples that are scored: those of a file, or 45 made-up ones. Standard library only."""

import json
import pydoc_data.topics
import random
from pathlib import Path
from typing import Any

# Characters of an example (input and output), by task, about those of the nine tasks that
# LM-Cocktail's own file has five examples of each.
TASK_LENGTHS = (240, 260, 80, 910, 140, 110, 330, 130, 160)
EXAMPLES_PER_TASK = 5


def read_examples(path: Path) -> list[dict[str, str]]:
    """Return the examples of a JSON list, of a JSON object of lists (all of them), or of lines."""
    text = path.read_text()
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    of_tasks = [value] if isinstance(value, list) else value.values()
    return [example for examples in of_tasks for example in examples]


def copy_examples(data: Path | None, path: Path, count: int | None = None) -> Path:
    """Write the first `count` examples of a file, or made-up ones, as one JSON list; say which."""
    examples = (made_up_examples() if data is None else read_examples(data))[:count]
    print(f"{len(examples)} examples: {'made up' if data is None else data.name}")
    path.write_text(json.dumps(examples, indent=1) + "\n")
    return path


def made_up_examples() -> list[dict[str, str]]:
    """Return 45 examples of words that python's manual has, the same ones every time."""
    generator = random.Random(45)
    words = [
        word for word in pydoc_data.topics.topics["dynamic-features"].split() if word.isalpha()
    ]

    def sentence(num_characters: float) -> str:
        return " ".join(generator.choices(words, k=max(1, round(num_characters / 6))))

    return [
        {
            "input": sentence(length * generator.uniform(0.75, 1.15)) + ".\n",
            "output": sentence(generator.choice((2, 5, 20, 60))),
        }
        for length in TASK_LENGTHS
        for _ in range(EXAMPLES_PER_TASK)
    ]
