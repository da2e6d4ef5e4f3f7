"""MLX reads functions from an entry: from memory or from a temporary file, constants after the block, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_mps.cache import Store, entry, key

mx = pytest.importorskip("mlx.core")
np = pytest.importorskip("numpy")

pytestmark = pytest.mark.device


@pytest.mark.parametrize("memory", [True, False], ids=["in memory", "temporary file"])
def test_import_from_an_entry(store: Store, tmp_path: Path, memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function's lazy constants are read at its first run, when the file has no name any more."""
    if not memory:
        monkeypatch.setattr(entry, "_has_memory_files", lambda: False)
    table = np.arange(4096, dtype=np.float32)
    weights = mx.array(table)
    mx.eval(weights)
    exported = tmp_path / "f.mlxfn"
    mx.export_function(str(exported), lambda x: [mx.sin(x) + weights], mx.zeros(4096))
    assert store.put(key(("module", "sin")), {}, {"0.mlxfn": exported}, {})
    found = store.get(key(("module", "sin")))
    assert found is not None
    with found.path("0.mlxfn") as path:
        function = mx.import_function(str(path))
    (result,) = function(mx.zeros(4096))
    np.testing.assert_array_equal(np.array(result), table)
