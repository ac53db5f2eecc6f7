"""The examples that are scored: those of a file, or 45 made-up ones. Standard library only."""

import json
import random
from pathlib import Path
from typing import Any

# Characters of an example (input and output), by task, about those of the nine tasks that
# LM-Cocktail's own file has five examples of each.
TASK_LENGTHS = (240, 260, 80, 910, 140, 110, 330, 130, 160)
EXAMPLES_PER_TASK = 5

COMMON_WORDS = (
    "the of and to a in is that it was for on are as with his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see "
    "time could no make than first been its who now people my made over did down only way find "
    "use may water long little very after words called just where most know"
)


def read_examples(path: Path) -> list[dict[str, str]]:
    """Return the examples of a JSON list, of a JSON object of lists (all of them), or of lines."""
    text = path.read_text()
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(value, list):
        return value
    return [example for examples in value.values() for example in examples]


def copy_examples(data: Path | None, path: Path, count: int | None = None) -> Path:
    """Write the first `count` examples of a file, or made-up ones, as one JSON list; say which."""
    examples = (made_up_examples() if data is None else read_examples(data))[:count]
    print(f"{len(examples)} examples: {'made up' if data is None else data.name}")
    path.write_text(json.dumps(examples, indent=1) + "\n")
    return path


def made_up_examples() -> list[dict[str, str]]:
    """Return 45 examples of common words, the same ones every time."""
    generator = random.Random(45)
    vocabulary = COMMON_WORDS.split()

    def sentence(num_characters: float) -> str:
        words: list[str] = []
        while sum(map(len, words)) + len(words) < num_characters:
            words.append(generator.choice(vocabulary))
        return " ".join(words).capitalize()

    return [
        {
            "input": sentence(length * generator.uniform(0.75, 1.15)) + ".\n",
            "output": sentence(generator.choice((2, 5, 20, 60))),
        }
        for length in TASK_LENGTHS
        for _ in range(EXAMPLES_PER_TASK)
    ]
