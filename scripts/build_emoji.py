"""Make the bundled emoji set from the full collection: `python scripts/build_emoji.py COLLECTION.parquet OUT.parquet`.

The collection holds emoji of seven vendors at 64 x 64, rendered from the packages that
`workflows/data/bundled/ATTRIBUTION.md` lists, with their condition columns. Kept are the vendors whose licence permits
redistribution beside code of any licence: OpenMoji's share-alike pictures are left out. Nothing is re-encoded, so every
picture keeps its bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

LICENCES = ("Apache-2.0", "MIT", "CC-BY-4.0")
COLUMNS = [
    "id", "concept", "vendor", "license", "label", "caption", "captions", "tags", "group", "subgroup", "tone", "split",
    "image", "seg", "seg_kind",
]  # fmt: skip
LARGEST_BYTES = 20_000_000


def build(collection: Path, out: Path) -> int:
    """Write the permitted rows, sorted by id; returns how many."""
    table = pq.read_table(collection, columns=COLUMNS)
    permitted = table.filter(pc.is_in(table["license"], value_set=pa.array(LICENCES)))
    permitted = permitted.replace_schema_metadata(None).sort_by("id")
    pq.write_table(permitted, out, compression="zstd", compression_level=19, row_group_size=512)
    if out.stat().st_size > LARGEST_BYTES:
        raise SystemExit(f"{out} has {out.stat().st_size:,} bytes; at most {LARGEST_BYTES:,} belong in the repository")
    return int(permitted.num_rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(build(Path(sys.argv[1]), Path(sys.argv[2])), "rows")
