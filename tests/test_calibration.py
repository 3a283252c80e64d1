"""The calibration file: found again under the same facts, ignored when broken."""

from pathlib import Path

import pytest

from streamserve.calibration import Calibration, stored

FACTS = {"cpu": "a processor", "threads": 2, "torch": "2.13"}


def test_what_was_measured_is_found_again(tmp_path: Path) -> None:
    Calibration(FACTS, tmp_path).store({"network": "numba", "ms": 1.5})
    assert Calibration(dict(reversed(FACTS.items())), tmp_path).load() == {"network": "numba", "ms": 1.5}


def test_other_facts_find_nothing(tmp_path: Path) -> None:
    Calibration(FACTS, tmp_path).store({"network": "numba"})
    assert Calibration({**FACTS, "threads": 1}, tmp_path).load() is None


def test_a_broken_file_is_ignored_and_replaced(tmp_path: Path) -> None:
    calibration = Calibration(FACTS, tmp_path)
    for text in ("", "{", "[]", '{"facts": {}, "measured": {}}', '{"facts": 1}', "\x00"):
        calibration.path.write_text(text)
        assert calibration.load() is None
    calibration.store({"a": 1})
    assert calibration.load() == {"a": 1}
    assert list(tmp_path.iterdir()) == [calibration.path]  # nothing temporary is left


def test_a_folder_that_cannot_be_written_does_not_stop_a_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    calibration = Calibration(FACTS, tmp_path / "file" / "below")
    calibration.store({"a": 1})
    assert calibration.load() is None


def test_the_doctor_sees_all_files_and_survives_broken_ones(tmp_path: Path) -> None:
    Calibration(FACTS, tmp_path).store({"a": 1})
    (tmp_path / "calibration-0000.json").write_text("{")
    contents = [content for _, content in stored(tmp_path)]
    assert sorted(contents, key=len) == [{}, {"facts": FACTS, "measured": {"a": 1}}]


def test_facts_whose_order_changes_from_process_to_process_are_refused() -> None:
    """A set of strings is written in another order in every process: under such a key nothing would be found again."""
    with pytest.raises(TypeError):
        Calibration({"features": frozenset({"avx2", "fma"})})
