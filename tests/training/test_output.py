"""The output folder: nothing is lost, and nothing foreign is touched."""

import pytest

from igulora.training.output import check_output, check_same_run, clear_output


def test_new_and_empty_folders_are_fine(tmp_path):
    check_output(tmp_path, False, False)
    check_output(tmp_path / "new", False, True)
    assert not (tmp_path / "new").exists()


def test_full_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="expected an empty or new folder for --output, found files in .* choose another"
    ):
        check_output(tmp_path, False, False)
    with pytest.raises(ValueError, match="expected --overwrite to replace an earlier run, found none"):
        check_output(tmp_path, False, True)
    with pytest.raises(ValueError, match="expected a run with a checkpoint to resume in .*, found no run"):
        check_output(tmp_path, True, False)
    with pytest.raises(ValueError, match="got both"):
        check_output(tmp_path, True, True)
    with pytest.raises(ValueError, match="got the file"):
        check_output(tmp_path / "notes.txt", False, False)


def test_overwriting_removes_a_run_and_nothing_else(tmp_path):
    for name in ("run.json", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="add --overwrite to replace the run in it"):
        check_output(tmp_path, False, False)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001" / "checkpoint.json").write_text("{}")
    with pytest.raises(ValueError, match="add --resume to go on with the run in it, or --overwrite"):
        check_output(tmp_path, False, False)
    check_output(tmp_path, False, True)
    clear_output(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_needs_a_checkpoint_and_the_same_options(tmp_path):
    (tmp_path / "run.json").write_text('{"settings": {"lr": 0.1, "threads": 1}}')
    with pytest.raises(ValueError, match="found a run without a checkpoint"):
        check_output(tmp_path, True, False)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="found a finished run"):
        check_output(tmp_path, True, False)
    check_same_run(tmp_path, {"settings": {"lr": 0.1, "threads": 2}}, frozenset({"threads"}))
    with pytest.raises(ValueError, match=r"lr: 0.1 then, 0.2 now"):
        check_same_run(tmp_path, {"settings": {"lr": 0.2, "threads": 2}}, frozenset({"threads"}))
    # An option that came into being later: the run was as its default has it.
    usual, wanted = {"settings": {"lr": 1.0, "patience": 3}}, {"settings": {"lr": 0.1, "threads": 1, "patience": 3}}
    check_same_run(tmp_path, wanted, frozenset(), usual)
    with pytest.raises(ValueError, match=r"patience: 3 then, 4 now"):
        check_same_run(tmp_path, {"settings": {**wanted["settings"], "patience": 4}}, frozenset(), usual)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        check_same_run(tmp_path, {}, frozenset())
