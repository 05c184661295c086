"""Write the sample reviews as an Iceberg table with a partition for each day.

From the root of the repository, with the address of a catalogue `lake` for pyiceberg:

    export PYICEBERG_CATALOG__LAKE__URI=sqlite:////tmp/lake.db
    python sample_data/examples/iceberg_table.py raw.landing /tmp/tables/landing
"""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.catalog import load_catalog
from pyiceberg.table import Table

FILES = (
    "day=2026-11-01/part-0.parquet",
    "day=2026-11-02/part-0.parquet",
    "day=2026-11-03/part-0.parquet",
)


def write(name: str, folder: str) -> Table:
    """Append the rows of each file in a snapshot of its own, and return the table."""
    catalog = load_catalog("lake")
    catalog.create_namespace_if_not_exists(name.rpartition(".")[0])
    table = None
    for file in FILES:
        rows = pq.read_table(f"sample_data/reviews/{file}", partitioning=None)
        day = pa.repeat(file.partition("=")[2].partition("/")[0], rows.num_rows)
        rows = rows.append_column("day", day)
        # Iceberg has no time zone but UTC.
        at = rows.schema.get_field_index("created")
        rows = rows.set_column(at, "created", rows["created"].cast(pa.timestamp("us", "UTC")))
        if table is None:
            table = catalog.create_table(name, rows.schema, location=folder)
            with table.update_spec() as spec:
                spec.add_identity("day")
        table.append(rows)
    return table


if __name__ == "__main__":
    table = write(*sys.argv[1:])
    print(f"{table.location()}: snapshot {table.current_snapshot().snapshot_id}")
