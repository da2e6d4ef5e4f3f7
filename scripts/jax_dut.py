"""A pytest plugin: JAX's tests skip themselves as on the platform that $JAX_TEST_DUT names. Under pytest, JAX's own flag jax_test_dut reads nothing."""

from __future__ import annotations

import os
import sys

import jax
import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems() -> None:
    """Set the flag, once the tests' modules are imported: importing JAX's test utilities earlier breaks what they capture."""
    from jax._src import test_util

    platform = os.environ["JAX_TEST_DUT"]
    jax.config.update("jax_test_dut", platform)
    assert test_util.device_under_test() == platform
    if compat := sys.modules.get("jax._src.internal_test_util.export_back_compat_test_util"):
        # These tests do not read the flag. The programs stored for this platform, and those exported for it now, still run on the default device.
        compat.CompatTestBase.default_jax_backend = lambda self: platform
