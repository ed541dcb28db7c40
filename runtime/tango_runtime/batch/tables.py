"""Rows of the files that people have: JSONL, Parquet, and the folders that Hugging Face's ``datasets`` saves."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_runtime.util.files import atomic_write
from tango_runtime.util.jsonschema import parse_json, unique_keys

#: Files of a folder that ``datasets`` saved: of one split, and of several.
STATE, _SPLITS = "state.json", "dataset_dict.json"


def read_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[tuple[int, dict[str, Any] | TangoError]]:
    """Reads a table, row by row.

    Args:
        path: A file of JSON lines, a ``.parquet`` file, or a folder that ``Dataset.save_to_disk`` wrote.
        columns: The columns that are needed; None for all. Others may be large, or hold what Python has no value for.

    Yields:
        (number of the line or row, from 1; the row, or why the line is none). Blank lines are left out.

    Raises:
        TangoError: There is no such table, it cannot be read, or pyarrow is not installed for it.
    """
    if not path.exists():
        raise TangoError(f"there is no {path}", "give a .jsonl or .parquet file, or a folder that datasets saved")
    if path.is_dir():
        return _arrow_rows(path, columns)
    return _parquet_rows(path, columns) if path.suffix == ".parquet" else _json_rows(path)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a ``.parquet`` file.

    Raises:
        TangoError: It cannot be written, or pyarrow is not installed.
    """
    pyarrow = require_pyarrow(path)
    import pyarrow.parquet as parquet

    try:
        table = pyarrow.Table.from_pylist(list(rows))
    except (pyarrow.ArrowException, OverflowError) as error:
        raise TangoError(
            f"the answers are no table: {error}",
            "give all questions ids of one type, of 64 bits; the .jsonl has all answers",
        ) from error
    atomic_write(path, lambda stream: parquet.write_table(table, stream))


def require_pyarrow(path: Path) -> Any:
    """pyarrow.

    Raises:
        TangoError: It is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise TangoError(
            f"{path} needs pyarrow, which is not installed", "pip install 'tango-edge[parquet]'"
        ) from error
    return pyarrow


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | TangoError]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # which editors on Windows write
            if line.strip():
                yield number, _json_row(line, f"{path} line {number}")


def _json_row(line: bytes, where: str) -> dict[str, Any] | TangoError:
    try:
        row = parse_json(line, where, "write one object per line, as UTF-8")
    except TangoError as error:
        return error
    if not isinstance(row, dict):
        return TangoError(f"{where} is not an object", 'write {"video": …, "question": …}')
    return row


def _parquet_rows(path: Path, columns: Collection[str] | None) -> Iterator[tuple[int, dict[str, Any] | TangoError]]:
    pyarrow = require_pyarrow(path)
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = _needed(file.schema_arrow.names, columns)
            yield from _numbered(file.iter_batches(columns=names))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _arrow_rows(folder: Path, columns: Collection[str] | None) -> Iterator[tuple[int, dict[str, Any] | TangoError]]:
    if (folder / _SPLITS).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{STATE}"))
        raise TangoError(
            f"{folder} holds {len(splits)} splits: {', '.join(splits)}",
            f"give one: {folder / (splits or ['SPLIT'])[0]}",
        )
    if not (folder / STATE).is_file():
        raise TangoError(f"{folder} has no {STATE}", "give a folder that Dataset.save_to_disk wrote, or a file")
    pyarrow = require_pyarrow(folder)
    try:
        state = json.loads((folder / STATE).read_bytes(), object_pairs_hook=unique_keys)
        names = [str(file["filename"]) for file in state["_data_files"]]
        if state.get("_indices_data_files"):
            raise TangoError(f"{folder} selects rows of its table", "save it anew: dataset.flatten_indices()")
        batches = (batch for name in names for batch in _batches(pyarrow, folder / name))
        yield from _numbered(batch.select(_needed(batch.schema.names, columns)) for batch in batches)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error


def _needed(names: Sequence[str], columns: Collection[str] | None) -> list[str]:
    found = [name for name in names if columns is None or name in columns]
    if len(set(found)) < len(found):
        raise ValueError(f"two columns are called {next(name for name in found if found.count(name) > 1)}")
    return found


def _batches(pyarrow: Any, file: Path) -> Iterator[Any]:
    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
        yield from reader


def _numbered(batches: Iterator[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _unreadable(path: Path, error: Exception) -> TangoError:
    return TangoError(f"{path} cannot be read as a table: {error}", "write it again")
