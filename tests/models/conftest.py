from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.tiny import VARIANTS, build_reference


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads than free cores make torch's barriers crawl."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved random model of every variant."""
    found = {}
    for variant in VARIANTS:
        found[variant] = tmp_path_factory.mktemp(variant)
        build_reference(variant).save_pretrained(found[variant])
    return found
