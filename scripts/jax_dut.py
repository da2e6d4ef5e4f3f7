"""A pytest plugin: JAX's tests skip themselves as on the platform that $JAX_TEST_DUT names. Under pytest, JAX's own flag jax_test_dut reads nothing."""

from __future__ import annotations

import os

import jax
import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems() -> None:
    """Set the flag, once the tests' modules are imported: importing JAX's test utilities earlier breaks what they capture."""
    from jax._src import test_util

    platform = os.environ["JAX_TEST_DUT"]
    jax.config.update("jax_test_dut", platform)
    assert test_util.device_under_test() == platform
