"""The atlas as a Parquet file: columns of fixed types, what they were measured on in the schema's metadata.

A file of a run folder is not trusted: it must have exactly the columns, types and rows that an atlas has, and
values that an atlas can have. pyarrow runs nothing that a file says.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neuron_sparsity.store import decode, parse_header, read_bytes, to_json_text, write_bytes
from neuron_sparsity.taxonomy.classes import CLASSES

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["ATLAS_FILE", "COLUMNS", "LOGIT_COLUMNS", "PASS_COLUMNS", "ROLES", "read_table", "write_table"]

ATLAS_FILE = "atlas.parquet"
ROLES = ("prediction", "suppression", "partition", "none")

STATISTICS_COLUMNS = {
    "layer": "int32",
    "neuron": "int32",
    "class": "string",
    "activation_frequency": "double",
    "activation_count": "int64",
    "frequency_bound_95": "double",
    "mean_contribution": "double",
    "rms_contribution": "double",
    "max_contribution": "double",
    "contribution_share_of_layer": "double",
}
PASS_COLUMNS = {
    "n_covering_tokens": "int32",
    "n_triggers": "int32",
    "triggers": "list<element: string>",
    "is_token_detector": "bool",
    "ngram": "int32",
    "position_information_bits": "double",
    "position_information_by_chance_bits": "double",
    "is_positional": "bool",
}
LOGIT_COLUMNS = {
    "top_logit_tokens": "list<element: string>",
    "bottom_logit_tokens": "list<element: string>",
    "logit_mean": "double",
    "logit_std": "double",
    "logit_skew": "double",
    "logit_kurtosis": "double",
    "logit_role": "string",
}
COLUMNS = STATISTICS_COLUMNS | PASS_COLUMNS | LOGIT_COLUMNS
"""Name and type of every column, in their order."""

_METADATA = b"neuron_sparsity"
_MAY_BE_NAN = {"frequency_bound_95", "logit_skew", "logit_kurtosis"}
_WORDS = {"class": CLASSES, "logit_role": ROLES}
_BOUNDS = {"activation_frequency": 1.0, "frequency_bound_95": 1.0, "contribution_share_of_layer": 1.0 + 1e-9}


def write_table(path: Path, table: pd.DataFrame, header: Mapping[str, Any]) -> None:
    """Write a table whose columns are all in `COLUMNS`, with a JSON header, atomically.

    Raises:
        RunFolderError: If the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([pa.field(name, _type(COLUMNS[name])) for name in table.columns])
    columns = zip(table.columns, schema, strict=True)
    arrays = [pa.array(table[name].tolist(), type=field.type) for name, field in columns]
    whole = pa.Table.from_arrays(arrays, schema=schema.with_metadata({_METADATA: to_json_text(header).encode()}))
    buffer = io.BytesIO()
    pq.write_table(whole, buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read_table(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a table that `write_table` wrote, and its header.

    Raises:
        RunFolderError: If it is missing, damaged or of a newer schema.
    """
    data = read_bytes(path)
    whole = decode(path, lambda: _whole(data))
    header = parse_header(path, (whole.schema.metadata or {}).get(_METADATA, b""))
    return decode(path, lambda: _frame(whole, header)), header


def _type(name: str) -> pa.DataType:
    import pyarrow as pa

    if name.startswith("list"):
        return pa.list_(pa.field("element", pa.string()))
    return {"double": pa.float64(), "bool": pa.bool_()}.get(name) or getattr(pa, name)()


def _whole(data: bytes) -> pa.Table:
    """Read bytes as Parquet; whatever pyarrow says of them is a ValueError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        found = {field.name: str(field.type) for field in file.schema_arrow}
        if len(found) != len(file.schema_arrow) or list(found.items()) != [
            pair for pair in COLUMNS.items() if pair[0] in found
        ]:
            raise ValueError(f"columns {list(found.items())[:3]} ... are not those of an atlas")
        if missing := [name for name in STATISTICS_COLUMNS if name not in found]:
            raise ValueError(f"there is no column {missing[0]}")
        table = file.read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    return table


def _frame(table: pa.Table, header: Mapping[str, Any]) -> pd.DataFrame:
    """Return the table for pandas, once every value is one that an atlas of this header has."""
    import pandas as pd

    layers, d_mlp, n_tokens = header["model"]["layers"], int(header["model"]["d_mlp"]), int(header["n_tokens"])
    if table.num_rows != len(layers) * d_mlp:
        raise ValueError(f"{table.num_rows} rows are not those of {len(layers)} layers of {d_mlp} neurons")
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table.column(name)
        if column.null_count:
            raise ValueError(f"{name} has {column.null_count} values that are missing")
        kind = COLUMNS[name]
        columns[name] = column.to_pylist() if kind[:4] in ("list", "stri") else column.to_numpy()
    expected = [(int(layer), neuron) for layer in layers for neuron in range(d_mlp)]
    if list(zip(columns["layer"].tolist(), columns["neuron"].tolist(), strict=True)) != expected:
        raise ValueError(f"rows are not those of {len(layers)} layers of {d_mlp} neurons, in their order")
    for name, values in columns.items():
        _check(name, values, n_tokens)
    return pd.DataFrame(columns)


def _check(name: str, values: Any, n_tokens: int) -> None:
    """Raise ValueError if a column holds a value that no atlas has."""
    if name in _WORDS:
        if strange := set(values) - set(_WORDS[name]):
            raise ValueError(f"{name} is {sorted(strange)[0]!r}, not one of {', '.join(_WORDS[name])}")
    elif COLUMNS[name].startswith("list"):
        if any(None in words for words in values):
            raise ValueError(f"{name} has a token that is missing")
    elif COLUMNS[name] == "double":
        finite = np.isfinite(values)
        if not (finite | np.isnan(values) if name in _MAY_BE_NAN else finite).all():
            raise ValueError(f"{name} is NaN or infinite")
        if name in _BOUNDS and not ((values >= 0) & (values <= _BOUNDS[name]) | ~finite).all():
            raise ValueError(f"{name} is outside 0 to 1")
    elif COLUMNS[name] != "bool":
        most = {"activation_count": n_tokens, "n_covering_tokens": n_tokens, "n_triggers": n_tokens, "ngram": 3}
        if (values < 0).any() or (values > most.get(name, np.iinfo(np.int32).max)).any():
            raise ValueError(f"{name} is outside 0 to {most.get(name)}")
