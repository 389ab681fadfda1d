"""Reading files, mapping columns, and refusing what does not fit."""

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from igulora.training.data import BatchStream, DataSource, Example, class_names, hold_out, load_table, read_examples

TABLE = pa.table(
    {"text": ["a", "b, c", 'd "e"\nf'], "label": ["x", "y", "x"], "score": [0.5, 1.0, -1.0], "count": [1, 2, 3]}
)


def write(path, suffix, table=TABLE):
    file = path / f"rows.{suffix}"
    if suffix == "csv":
        pyarrow.csv.write_csv(table, file)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        import json

        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return DataSource(str(file))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_formats_agree(tmp_path, suffix):
    table = load_table(write(tmp_path, suffix))
    rows = read_examples(table, "classification", "rows")
    assert rows == [Example("a", "x"), Example("b, c", "y"), Example('d "e"\nf', "x")]
    numbers = read_examples(table, "regression", "rows", ["text", "label"], "score")
    assert numbers[1] == Example("b, c", 1.0, "y")
    prompts = read_examples(table, "causal-lm", "rows", ["text", "label"], "count")
    assert prompts[0] == Example("a\n\nx", "1")


def test_hub_data_sets_name_their_classes(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: rows)
    table = load_table(DataSource("owner/rows"))
    assert [e.target for e in read_examples(table, "classification", "rows")] == ["yes", "no"]


def test_missing_empty_and_foreign_files(tmp_path):
    with pytest.raises(ValueError, match=r"found nothing at .*none\.csv; check the path"):
        load_table(DataSource(str(tmp_path / "none.csv")))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"at least one row of data in .*empty\.csv, got an empty file"):
        load_table(DataSource(str(tmp_path / "empty.csv")))
    (tmp_path / "header.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="at least one row"):
        load_table(DataSource(str(tmp_path / "header.csv")))
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"expected a file ending in \.csv"):
        load_table(DataSource(str(tmp_path / "rows.txt")))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="one JSON object per line"):
        load_table(DataSource(str(tmp_path / "bad.jsonl")))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1....")
    with pytest.raises(ValueError, match="a readable parquet file"):
        load_table(DataSource(str(tmp_path / "cut.parquet")))


def test_missing_columns_list_those_there_are():
    with pytest.raises(
        ValueError, match=r"column 'txet' in rows; its columns are text, label, score, count. Did you mean 'text'"
    ):
        read_examples(TABLE, "classification", "rows", ["txet"])
    with pytest.raises(
        ValueError, match=r"'response' or .* its columns are text, .*Name the right one with --response-column"
    ):
        read_examples(TABLE, "causal-lm", "rows", ["text"])


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        (
            "regression",
            "label",
            "expected numbers in the column 'label' .*string.*class names are --task classification",
        ),
        (
            "classification",
            "score",
            "expected class names or integers in the column 'score' .*double.*--task regression",
        ),
    ],
)
def test_wrong_task(task, target, message):
    with pytest.raises(ValueError, match=message):
        read_examples(TABLE, task, "rows", ["text"], target)


def test_nulls_infinities_and_nested_columns():
    table = pa.table({"text": ["a", None], "score": [1.0, float("nan")], "turns": [["a"], ["b"]]})
    with pytest.raises(
        ValueError, match=r"a value in every row of the column 'text' .* got 1 without one \(first: row 2\)"
    ):
        read_examples(table, "regression", "rows", ["text"], "score")
    with pytest.raises(ValueError, match=r"expected finite numbers .* got nan in row 2"):
        read_examples(table.set_column(0, "text", [["a", "b"]]), "regression", "rows", ["text"], "score")
    with pytest.raises(ValueError, match="expected text in the column 'turns'"):
        read_examples(table, "regression", "rows", ["turns"], "score")
    with pytest.raises(ValueError, match="one or two text columns"):
        read_examples(TABLE, "classification", "rows", ["text", "label", "count"], "label")


def test_classes_come_from_the_training_rows():
    rows = [Example("", name) for name in ("10", "9", "10")]
    assert class_names(rows, rows) == ["9", "10"]
    with pytest.raises(ValueError, match="got '11' as well; the training data has '10', '9'"):
        class_names(rows, [Example("", "11")])
    with pytest.raises(ValueError, match="at least two classes in the training data, got 1: 10"):
        class_names(rows[:1], [])


def test_hold_out_is_a_seeded_partition():
    rows = [Example(str(i), "x") for i in range(20)]
    train, held = hold_out(rows, 0.2, seed=1)
    assert (len(train), len(held)) == (16, 4)
    assert sorted(e.text for e in train + held) == sorted(e.text for e in rows)
    assert hold_out(rows, 0.2, seed=1) == (train, held) != hold_out(rows, 0.2, seed=2)
    with pytest.raises(ValueError, match=r"fraction in \(0, 1\)"):
        hold_out(rows, 1.5, 0)
    with pytest.raises(ValueError, match="at least 2 rows"):
        hold_out(rows[:1], 0.5, 0)


def test_stream_visits_every_row_once_an_epoch_from_any_position():
    stream = BatchStream(size=10, batch_size=4, seed=3)
    batches = [stream[k] for k in range(6)]
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(10))
    assert batches[:3] != batches[3:]
    assert BatchStream(10, 4, 3)[4] == batches[4]
