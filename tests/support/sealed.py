"""An output's shardmix.json edited, with its digest of itself made anew or left as it was."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edit_provenance(
    folder: Path, edit: Callable[[dict[str, Any]], object], *, is_sealed: bool = True
) -> None:
    """Edit it as a program would; sealed, nothing tells of that but another SHA-256."""
    path = folder / "shardmix.json"
    content = json.loads(path.read_text())
    edit(content)
    if not is_sealed:
        path.write_text(json.dumps(content, indent=2) + "\n")
        return
    del content["sha256_above"]
    above = json.dumps(content, indent=2).removesuffix("\n}") + ',\n  "sha256_above": "'
    path.write_text(above + hashlib.sha256(above.encode()).hexdigest() + '"\n}\n')
