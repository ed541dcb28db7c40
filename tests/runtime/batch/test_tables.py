"""Questions and answers in Parquet, and in folders that Hugging Face's datasets saves."""

from __future__ import annotations

import json

import pytest

from tango_plugins import TangoError
from tango_runtime.batch.questions import read_questions
from tango_runtime.batch.tables import read_rows, write_rows
from tango_runtime.cli.main import main

pyarrow = pytest.importorskip("pyarrow")

ROWS = [
    {"video": "a.mp4", "question": "Who?", "options": ["a dog", "a man"], "duration": 3.5},
    {"video": "b.mp4", "question": "What?", "options": None, "duration": 1.0},
    {"video": None, "question": "Where?", "options": None, "duration": 1.0},
]


def as_table(rows):
    return pyarrow.Table.from_pylist(rows) if isinstance(rows, list) else rows


def parquet(path, rows):
    import pyarrow.parquet

    pyarrow.parquet.write_table(as_table(rows), path, row_group_size=1)


def saved(folder, rows, **state):
    """What ``Dataset.from_list(rows).save_to_disk(folder, num_shards=2)`` writes of its data."""
    folder.mkdir()
    table = as_table(rows)
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (table.slice(0, 1), table.slice(1)), strict=True):
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, part.schema) as stream:
            stream.write_table(part)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None, **state}))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("write", [parquet, saved])
def test_a_table_gives_the_questions_that_its_lines_give(tmp_path, write):
    table = tmp_path / "questions.parquet"
    write(table, ROWS)
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    videos, failures = read_questions(table, tmp_path)
    assert (videos, failures) == read_questions(tmp_path / "questions.jsonl")
    assert [len(video.questions) for video in videos] == [1, 1]
    assert [failure.line for failure in failures] == [3]


def test_a_folder_of_splits_asks_for_one(tmp_path):
    saved(tmp_path / "test", ROWS)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    with pytest.raises(TangoError, match="holds 1 splits: test") as caught:
        list(read_rows(tmp_path))
    assert caught.value.hint == f"give one: {tmp_path / 'test'}"


def test_a_folder_that_selects_rows_is_refused(tmp_path):
    saved(tmp_path / "data", ROWS, _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(TangoError, match="selects rows"):
        list(read_rows(tmp_path / "data"))


def test_what_is_no_table_is_named(tmp_path):
    (tmp_path / "questions.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(TangoError, match="cannot be read as a table"):
        list(read_rows(tmp_path / "questions.parquet"))
    saved(tmp_path / "data", ROWS)
    (tmp_path / "data/data-00000-of-00002.arrow").write_bytes(b"none")
    with pytest.raises(TangoError, match="cannot be read as a table"):
        list(read_rows(tmp_path / "data"))


@pytest.mark.parametrize("write", [parquet, saved])
def test_two_columns_of_one_name_are_refused(tmp_path, write):
    columns = ("video", "question", "video")
    write(tmp_path / "questions.parquet", pyarrow.table([["a.mp4"], ["Who?"], ["b.mp4"]], names=columns))
    with pytest.raises(TangoError, match="cannot be read as a table: two columns are called video"):
        read_questions(tmp_path / "questions.parquet")


def test_a_state_with_a_key_twice_is_refused(tmp_path):
    saved(tmp_path / "data", ROWS)
    state = tmp_path / "data/state.json"
    state.write_text(state.read_text().replace("{", '{"_data_files": [], ', 1))
    with pytest.raises(TangoError, match='the key "_data_files" twice'):
        list(read_rows(tmp_path / "data"))


def test_a_cell_that_json_does_not_have_is_named(tmp_path):
    parquet(tmp_path / "questions.parquet", [{"video": b"a.mp4", "question": "Who?"}])
    ((failure,),) = read_questions(tmp_path / "questions.parquet")[1:]
    assert failure.message == "video is of type bytes"


@pytest.mark.parametrize("write", [parquet, saved])
def test_other_columns_are_not_read(tmp_path, write):
    """Such as a time in nanoseconds, which Python's datetime does not hold."""
    times = pyarrow.array([1, 1234567890123456789], pyarrow.timestamp("ns"))
    rows = [{"video": "a.mp4", "question": "Who?"}, {"video": "b.mp4", "question": "What?"}]
    table = pyarrow.Table.from_pylist(rows).append_column("when", times)
    write(tmp_path / "table.parquet", table)
    videos, failures = read_questions(tmp_path / "table.parquet")
    assert ([video.name for video in videos], failures) == (["a.mp4", "b.mp4"], [])
    with pytest.raises(TangoError, match="cannot be read as a table"):
        list(read_rows(tmp_path / "table.parquet"))


def test_batch_reads_and_writes_parquet(tmp_path, tiny_bundle, clip):
    rows = [{"video": str(clip), "question": text, "id": i} for i, text in enumerate(("Who?", "What?"))]
    parquet(tmp_path / "questions.parquet", rows)
    output = tmp_path / "answers.parquet"
    command = ["batch", tiny_bundle, tmp_path / "questions.parquet", "--output", output]
    assert main([*map(str, command), "--max-new-tokens", "4", "--decoders", "0"]) == 0
    found = [row for _, row in read_rows(output)]
    assert found == [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in found) == [0, 1]


def test_ids_of_two_types_are_no_column(tmp_path):
    with pytest.raises(TangoError, match="the answers are no table"):
        write_rows(tmp_path / "answers.parquet", [{"id": 1}, {"id": "one"}])
    with pytest.raises(TangoError, match="the answers are no table"):
        write_rows(tmp_path / "answers.parquet", [{"id": 10**30}])
    assert not (tmp_path / "answers.parquet").exists()
