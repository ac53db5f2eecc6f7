"""`python -m shardmix`: the command line."""

from shardmix.cli import main

if __name__ == "__main__":
    main()
