"""Merges in processes of their own, whose peak must keep to the projection."""

import json
import re
from pathlib import Path
from typing import Any

from shardmix.system.units import parse_size
from tests.support.fresh_process import python

_MERGE = """
import json, sys, shardmix
models, output, options = json.loads(sys.argv[1])
try:
    report = shardmix.merge(models, output, fsync=False, **options)
    print(json.dumps([report.peak_rss_bytes, report.projected_peak_bytes]))
except shardmix.BudgetError as error:
    print(error)
"""


def check_peak(models: list[Any], output: Path, *, is_least: bool = False, **options: Any) -> None:
    """Merge, and see that the peak is at most the projection, and that at most the budget.

    `is_least`: the budget is the least that a refusal says will do.
    """

    def printed(**more: Any) -> str:
        return python(_MERGE, json.dumps([models, str(output), options | more])).splitlines()[-1]

    if is_least:
        found = re.search(r"least that works here is ([\d.]+ ?MiB)", printed(max_memory="1MiB"))
        options["max_memory"] = found[1]
    peak, projected = json.loads(printed())
    assert peak <= projected
    if options.get("max_memory") is not None:
        assert projected <= parse_size(options["max_memory"])
