"""Record the digests of all outputs anew, and say which of them have changed."""

import json
import tempfile
from pathlib import Path

from tests.golden.arrangements import ARRANGEMENTS
from tests.golden.runs import RECORD, merge, output_digests, read_record, sources_digest


def main() -> None:
    """Run every arrangement, and write the record."""
    before = read_record() if RECORD.exists() else {}
    after = {}
    for name, arrangement in ARRANGEMENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            sources, out = Path(folder) / "sources", Path(folder) / "out"
            merge(arrangement, sources, out)
            after[name] = {
                "sources": sources_digest(arrangement, sources),
                "output": output_digests(out),
            }
    RECORD.write_text(json.dumps(after, indent=1) + "\n")
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            what = "new" if name not in before else "changed" if name in after else "gone"
            print(f"{what}: {name}")
    num_files = sum(len(each["output"]) for each in after.values())
    print(f"{len(after)} outputs, {num_files} files on record")


if __name__ == "__main__":
    main()
