"""`shardmix` as on a command line, but without its check that the output's disk has room.

For merges whose output takes less than its size, since holes are made in it (`holes.py`). What
is left out is left out by patching shardmix here: it has no switch for that.
"""

from unittest import mock

from shardmix import api
from shardmix.cli import main


def disk_has_room(*_arguments: object, **_options: object) -> None:
    """Say nothing."""


if __name__ == "__main__":
    with mock.patch.object(api, "check_disk", disk_has_room):
        main()
