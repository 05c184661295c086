"""Write the sample reviews as a Delta Lake table with a partition for each day.

From the root of the repository:

    python sample_data/examples/delta_table.py /tmp/tables/reviews
"""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, write_deltalake

FILES = (
    "day=2026-11-01/part-0.parquet",
    "day=2026-11-02/part-0.parquet",
    "day=2026-11-03/part-0.parquet",
)


def write(folder: str) -> DeltaTable:
    """Append the rows of each file in a commit of its own, and return the table."""
    for name in FILES:
        rows = pq.read_table(f"sample_data/reviews/{name}", partitioning=None)
        day = pa.repeat(name.partition("=")[2].partition("/")[0], rows.num_rows)
        write_deltalake(folder, rows.append_column("day", day), mode="append", partition_by=["day"])
    return DeltaTable(folder)


if __name__ == "__main__":
    table = write(sys.argv[1])
    print(f"{table.table_uri}: version {table.version()}, {table.count():,} rows")
