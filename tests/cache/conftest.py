"""Fixtures of the cache's tests, and the `campaign` marker for the long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_mps.cache import Store


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "campaign: minutes of fault injection; run with -m campaign")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave campaigns out unless they are asked for."""
    if "campaign" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("campaign"):
                item.add_marker(pytest.mark.skip(reason="a campaign; run with -m campaign"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A path for a cache that does not exist yet."""
    return tmp_path / "home" / "jax-mps"


@pytest.fixture
def store(folder: Path) -> Store:
    """An empty store."""
    return Store(folder, max_bytes=1 << 30)
