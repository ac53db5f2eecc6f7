"""The command line: thin. Parses, calls the library, renders."""

from shardmix.cli.app import main as main
