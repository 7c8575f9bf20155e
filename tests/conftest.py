"""Shared fixtures: where real data lie, and a generator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real Earth observation sets (``EVERYSAT_DATA``); the test is skipped, saying so, where it is missing."""
    folder = Path(os.environ.get("EVERYSAT_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets: EVERYSAT_DATA={folder} is no folder")
    return folder


@pytest.fixture(autouse=True, scope="session")
def no_installed_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Names of models mean fresh ones here, whatever weights this machine has installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERYSAT_WEIGHTS", str(tmp_path_factory.mktemp("weights")))
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
