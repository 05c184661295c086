"""The input and output of a run as OpenLineage datasets, with what is known of them as facets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
from openlineage.client.event_v2 import InputDataset, OutputDataset
from openlineage.client.facet_v2 import (
    column_lineage_dataset,
    data_quality_assertions_dataset,
    dataset_version_dataset,
    input_statistics_input_dataset,
    output_statistics_output_dataset,
    schema_dataset,
    storage_dataset,
)
from openlineage.client.naming import dataset as naming

import glmbatch
from glmbatch.errors import GlmbatchError
from glmbatch.ledger.fragments import Plan, open_fragment
from glmbatch.ledger.manifest import Manifest, PublishedFile
from glmbatch.report.summary import Summary
from glmbatch.run.lineage.columns import Use
from glmbatch.settings.addresses import TABLE_SCHEME
from glmbatch.store.files import whole_address
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.find import is_glob, split_glob
from glmbatch.store.inputs.found import Version, given_columns
from glmbatch.store.objects.clients import azure_account
from glmbatch.store.parquet import open_parquet
from glmbatch.store.tables.fitting import fitted_fields
from glmbatch.store.tables.iceberg import location_of

PRODUCER = f"https://pypi.org/project/glmbatch/{glmbatch.__version__}/"
VERSION_CHARS = 32

Facet = TypeVar("Facet")


class Name(NamedTuple):
    """What names a dataset in a catalogue."""

    namespace: str
    name: str


def facet(kind: Callable[..., Facet], **values: Any) -> Facet:
    """A facet of this `kind`, which names glmbatch as its producer."""
    return kind(producer=PRODUCER, **values)


def name_of(address: str) -> Name:
    """The name that OpenLineage's rules give the dataset at `address`."""
    scheme, is_address, rest = whole_address(address).partition("://")
    bucket, _, key = rest.strip("/").partition("/")
    key = key or "/"
    rule: naming.DatasetNaming = naming.LocalFileSystem(path=scheme)
    if is_address and scheme == "s3":
        rule = naming.S3(bucket_name=bucket, object_key=key)
    elif is_address and scheme == "gs":
        rule = naming.GCS(bucket_name=bucket, object_key=key)
    elif is_address:
        rule = naming.WASBS(container=bucket, service_name=azure_account(bucket), object_key=key)
    return Name(rule.get_namespace(), rule.get_name())


def bare_input(address: str) -> list[InputDataset]:
    """The input at `address`, of which no more is known; of a glob, the folder where it begins.

    None of a table whose folder its catalogue does not say now: a dataset has the name of that.
    """
    if address.startswith(TABLE_SCHEME):
        try:
            address = location_of(address)
        except GlmbatchError:
            return []
    folder = str(split_glob(Folder(address).path)[0]) if is_glob(address) else address
    name = name_of(folder)
    return [InputDataset(namespace=name.namespace, name=name.name)]


def bare_output(address: str) -> OutputDataset:
    """The output, of which no more is known."""
    name = name_of(address)
    return OutputDataset(namespace=name.namespace, name=name.name)


def input_name(address: str, plan: Plan) -> Name:
    """The dataset that `address` names: one file, or the folder above those of partitions."""
    sources = sources_of(plan)
    if len(sources) == 1:
        file = str(Folder(plan.root) / next(iter(sources)))
        if whole_address(address) == whole_address(file):
            return name_of(file)
    return name_of(plan.root)


def sources_of(plan: Plan) -> dict[str, int]:
    """The size in bytes of each source of a plan, 0 if it is not known."""
    sizes = {source: stamp[0] if stamp else 0 for source, stamp in plan.unchanged.items()}
    return sizes | {fragment.source: fragment.stamp[0] for fragment in plan.fragments}


def input_dataset(
    name: Name, plan: Plan, digests: Mapping[str, str], schema: pa.Schema | None
) -> InputDataset:
    """The input of a run. Its version is that of a table, or one of the `digests` of its sources.

    It has none while one of them is not known.
    """
    sizes = sources_of(plan)
    statistics = facet(
        input_statistics_input_dataset.InputStatisticsInputDatasetFacet,
        rowCount=None if plan.unchanged else plan.rows,
        size=sum(sizes.values()) if all(sizes.values()) else None,
        fileCount=len(sizes),
    )
    facets: dict[str, Any] = _with_schema(schema)
    if plan.version is not None:
        facets["version"] = _version(str(plan.version.number))
        facets["storage"] = _storage(plan.version.format.lower())
    elif sizes.keys() <= digests.keys():
        lines = "".join(f"{source} {digests[source]}\n" for source in sorted(sizes))
        version = hashlib.sha256(lines.encode()).hexdigest()[:VERSION_CHARS]
        facets["version"] = _version(version)
    return InputDataset(
        namespace=name.namespace,
        name=name.name,
        facets=facets,
        inputFacets={"inputStatistics": statistics},
    )


def digests_of(plan: Plan, manifest: Manifest | None) -> dict[str, str]:
    """The digest of each source: as planned, or as it was published if it did not change."""
    files = manifest.files if manifest is not None else ()
    digests = {file.source: file.source_digest for file in files if file.source in plan.unchanged}
    return digests | {fragment.source: fragment.digest for fragment in plan.fragments}


def input_schema(plan: Plan) -> pa.Schema | None:
    """The columns of the first file that is read, and of its folders' names."""
    for fragment in plan.fragments[:1]:
        with open_fragment(fragment) as file:
            columns = fitted_fields(file.schema_arrow, fragment.fitted)
            return _with_folders(pa.schema(columns), fragment.source, plan.version)
    return None


def output_schema(output: str, file: PublishedFile, version: Version | None) -> pa.Schema:
    """The columns of a published file and of its folders' names; the input had the `version`."""
    with open_parquet(Folder(output) / file.output_name) as opened:
        return _with_folders(opened.schema_arrow, file.output_name, version)


def _with_folders(schema: pa.Schema, name: str, version: Version | None) -> pa.Schema:
    given = [column for column in given_columns(name, version) if column not in schema.names]
    return pa.schema([*schema, *(pa.field(column, pa.string()) for column in given)])


def add_publication(
    dataset: OutputDataset, version: str, files: Sequence[PublishedFile], layer: str
) -> None:
    """Add to the output what a run published; `files` are those that it wrote.

    `layer` is parquet, or the format of the table over them.
    """
    sizes = [file.place[0] for file in files if file.place]
    statistics = facet(
        output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet,
        rowCount=sum(file.rows for file in files),
        size=sum(sizes) if len(sizes) == len(files) else None,
        fileCount=len(files),
    )
    facets: dict[str, Any] = {"version": _version(version)}
    if layer != "parquet":
        facets["storage"] = _storage(layer)
    dataset.facets = {**(dataset.facets or {}), **facets}
    dataset.outputFacets = {"outputStatistics": statistics}


def _version(version: str) -> Any:
    return facet(dataset_version_dataset.DatasetVersionDatasetFacet, datasetVersion=version)


def _storage(layer: str) -> Any:
    return facet(storage_dataset.StorageDatasetFacet, storageLayer=layer, fileFormat="parquet")


def _with_schema(schema: pa.Schema | None) -> dict[str, Any]:
    if schema is None:
        return {}
    fields = [_field(field, place) for place, field in enumerate(schema, 1)]
    return {"schema": facet(schema_dataset.SchemaDatasetFacet, fields=fields)}


def _field(field: pa.Field, place: int | None = None) -> schema_dataset.SchemaDatasetFacetFields:
    parts = list(field.type) if pa.types.is_struct(field.type) else []
    return schema_dataset.SchemaDatasetFacetFields(
        name=field.name,
        type="struct" if parts else str(field.type),
        ordinal_position=place,
        fields=[_field(part) for part in parts],
    )


def add_columns(
    dataset: OutputDataset,
    schema: pa.Schema,
    uses: Mapping[str, Sequence[Use]],
    filters: Iterable[str],
    source: Name,
) -> None:
    """Add its columns to `dataset`, and what they are made from in the input `source`.

    `filters` are the input columns that decide which rows there are.
    """
    fields = {}
    for column in schema.names:
        inputs = _input_fields(uses.get(column, ()), source)
        if inputs:
            fields[column] = column_lineage_dataset.Fields(inputFields=inputs)
    filtering = [Use(column, "INDIRECT", "FILTER", "data.where") for column in filters]
    lineage = facet(
        column_lineage_dataset.ColumnLineageDatasetFacet,
        fields=fields,
        dataset=_input_fields(filtering, source),
    )
    dataset.facets = {**(dataset.facets or {}), **_with_schema(schema), "columnLineage": lineage}


def _input_fields(uses: Iterable[Use], source: Name) -> list[Any]:
    by_column: dict[str, list[column_lineage_dataset.Transformation]] = {}
    for use in uses:
        made = column_lineage_dataset.Transformation(
            type=use.kind,
            subtype=use.subtype,
            description=use.description or None,
            masking=use.masks,
        )
        by_column.setdefault(use.column, []).append(made)
    fields = []
    for column, transformations in by_column.items():
        field = column_lineage_dataset.InputField(
            namespace=source.namespace,
            name=source.name,
            field=column,
            transformations=transformations,
        )
        fields.append(field)
    return fields


def add_assertions(dataset: OutputDataset, summary: Summary, steps: Collection[str]) -> None:
    """Add to `dataset` what the run of `summary` had to pass. Without values of rows."""
    kind = partial(data_quality_assertions_dataset.Assertion, severity="error")
    found = [kind(assertion="published", success=summary.refused is None)]
    for audit in summary.audits:
        found.append(
            kind(
                assertion=audit.what,
                success=audit.passed,
                column=audit.step if audit.step in steps else None,
                expected=f"at most {audit.allowed:g}",
                actual=f"{audit.measured:g}",
            )
        )
    for each in summary.measured:
        what, passed = "score on labelled rows", each.refused is None
        found.append(kind(what, passed, column=each.step, actual=f"{each.score:g}"))
    # A facet of inputs by its class, but this output is what was audited.
    assertions: Any = facet(
        data_quality_assertions_dataset.DataQualityAssertionsDatasetFacet, assertions=found
    )
    dataset.facets = {**(dataset.facets or {}), "dataQualityAssertions": assertions}
