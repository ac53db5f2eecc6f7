"""What is scored and how: the settings, the examples, and the command line that carries them.

Standard library only: the harness and every tool's own program import it.
"""

import argparse
import json
import random
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """The examples and the settings, the same for every tool; defaults are LM-Cocktail's."""

    data: Path
    """File of examples."""
    temperature: float = 5.0
    batch_size: int = 2
    max_input_length: int = 2048
    """Tokens; what is longer is cut off."""

    def options(self) -> list[str]:
        """The options that say so, in the words of `shardmix score`."""
        options = ["--data", str(self.data), "--temperature", str(self.temperature)]
        options += ["--batch-size", str(self.batch_size)]
        return [*options, "--max-input-length", str(self.max_input_length)]


def read_command_line(description: str) -> tuple[list[str], ScoringTask, list[dict[str, str]]]:
    """The models, the task and its examples that a tool's program was given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("models", nargs="+", help="checkpoint folders")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--max-input-length", type=int, required=True)
    given = vars(parser.parse_args())
    models = given.pop("models")
    task = ScoringTask(**given)
    return models, task, read_examples(task.data)


def read_examples(path: Path) -> list[dict[str, str]]:
    """The examples of a JSON list, of a JSON object of lists (all of them), or of JSON lines."""
    text = path.read_text()
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(value, list):
        return value
    return [example for examples in value.values() for example in examples]


def write_examples(path: Path, examples: list[dict[str, str]]) -> Path:
    """Write the examples as one JSON list."""
    path.write_text(json.dumps(examples, indent=1) + "\n")
    return path


def made_up_examples() -> list[dict[str, str]]:
    """45 examples of common words, the same ones every time."""
    generator = random.Random(45)
    vocabulary = COMMON_WORDS.split()

    def sentence(num_characters: float) -> str:
        words = []
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
