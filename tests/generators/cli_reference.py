"""Prints docs/cli.md: what `--help` says of every command, as Markdown.

python -m tests.generators.cli_reference > docs/cli.md
"""

import inspect
from collections.abc import Iterator

import click

from shardmix.cli.commands import app


def main() -> None:
    """Print the reference."""
    root = click.Context(app, info_name=app.name, **app.context_settings)
    commands = [
        click.Context(command, info_name=name, parent=root)
        for name, command in app.commands.items()
    ]
    summaries = [(name, command.get_short_help_str()) for name, command in app.commands.items()]
    sections = [
        f"# `{app.name}`",
        *description(root),
        *listing("Commands", summaries),
    ]
    for context in commands:
        sections += [f"## `{context.command_path}`", *description(context)]
        sections.append(text(context.command.epilog))
    print("\n\n".join(sections))


def description(context: click.Context) -> Iterator[str]:
    """Yield what a command does, how it is called, and its options."""
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    # Arguments are described in the text.
    options = [
        record
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context))
    ]
    yield text(command.help)
    yield "**Usage**:"
    yield f"```console\n$ {usage}\n```"
    yield from listing("Options", options)


def listing(title: str, entries: list[tuple[str, str]]) -> Iterator[str]:
    """Yield a list of names and what they mean."""
    yield f"**{title}**:"
    yield "\n".join(f"* `{name}`: {meaning}" for name, meaning in entries)


def text(content: str | None) -> str:
    """Return a help text without click's mark of a paragraph that stays as it is."""
    return inspect.cleandoc(content or "").replace("\b\n", "")


if __name__ == "__main__":
    main()
