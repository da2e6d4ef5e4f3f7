"""Several devices in one process: all are MLX's one, and a program for several runs on the host. Against JAX's cpu backend with as many."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from device.programs import Ran, run

MESH = """
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P, SingleDeviceSharding

platform = os.environ["JAX_PLATFORMS"]
mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
a = rng.normal(size=(8, 8)).astype(np.float32)
there = jax.device_put(a, NamedSharding(mesh, P("x", "y")))

def told(value):
    spec = getattr(value.sharding, "spec", None)
    parts = [(s.device.id, str(s.index)) for s in value.addressable_shards]
    return [np.asarray(value).tolist(), str(spec), parts]
"""

PROGRAMS = {
    "jit": "jax.jit(lambda a: (jnp.sum(a), a @ a.T, jnp.linalg.cholesky(a @ a.T + 9 * jnp.eye(8)), jnp.sort(a, 0)))(there)",
    "output sharding": "jax.jit(lambda a: a.T * 2, out_shardings=NamedSharding(mesh, P(None, ('x', 'y'))))(there)",
    "grad": "jax.grad(jax.jit(lambda a: jnp.sum(jnp.tanh(a @ a))))(there)",
    "shard_map": """jax.jit(jax.shard_map(
        lambda a: (a + lax.axis_index("x"), lax.psum(a, "x"), lax.all_gather(a, "y"), lax.ppermute(a, "x", [(i, (i + 1) % 4) for i in range(4)])),
        mesh=mesh, in_specs=P("x", "y"), out_specs=(P("x", "y"), P(None, "y"), P(None, "x", "y"), P("x", "y"))))(there)""",
    "collectives": """jax.jit(jax.shard_map(
        lambda a: (lax.pmax(a, "x"), lax.pmin(a, ("x", "y")), lax.pmean(a, "y"), lax.psum_scatter(a, "y", scatter_dimension=1, tiled=True),
                   lax.all_to_all(a, "y", 1, 0, tiled=True), lax.pshuffle(a, "y", [1, 0]), lax.ppermute(a, "x", [(0, 2)])),
        mesh=mesh, in_specs=P("x", "y"), out_specs=(P("x", "y"),) * 7, check_vma=False))(there)""",
    "pmap": "jax.pmap(lambda a: a / lax.psum(a, 'i'), axis_name='i')(a)",
    "loop": "jax.jit(lambda a: lax.fori_loop(0, 5, lambda i, a: jnp.sin(a @ a.T), a))(there)",
    "resharded": "jax.device_put(there, NamedSharding(mesh, P('y', 'x')))",
    "one of them": "jnp.sin(jax.device_put(a, jax.devices()[5])) + 1",
    "integers": "jax.jit(lambda a: (a.astype(jnp.int8) >> 1, (a > 0).sum(0), a.astype(jnp.bfloat16)))(there)",
    "no elements": "jax.jit(lambda a: (a * 2, a.sum(1)))(jax.device_put(a[:, :0], NamedSharding(mesh, P('x'))))",
    "no input": "jax.jit(lambda: jnp.arange(16.), out_shardings=NamedSharding(mesh, P('x')))()",
    "random": "jax.jit(lambda k: jax.random.normal(k, (8, 4)), out_shardings=NamedSharding(mesh, P('x')))(jax.random.key(3))",
}


def several(source: str, folder: Path, platform: str = "mps", **environment: str) -> Ran:
    return run(MESH + textwrap.dedent(source), folder, **{"JAX_PLATFORMS": platform, "JAX_NUM_CPU_DEVICES": "8", **environment})


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[list[object]]]]:
    """Values, shardings and placement of each program's results, on mps and on cpu."""
    lines = [f"got[{name!r}] = [told(v) for v in jax.tree.leaves({program})]" for name, program in PROGRAMS.items()]
    source = "\n".join(["got = {}", *lines, "report(got=got)"])
    return [several(source, tmp_path_factory.mktemp(p), p).report["got"] for p in ("mps", "cpu")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(both: list[dict[str, list[list[object]]]], name: str) -> None:
    """Values, shardings and which device has which part are those of JAX's cpu backend."""
    import numpy as np

    ours, theirs = (result[name] for result in both)
    assert len(ours) == len(theirs)
    for (value, spec, parts), (other, other_spec, other_parts) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.array(value), np.array(other), rtol=2e-5, atol=2e-6)
        assert (spec, parts) == (other_spec, other_parts)


def test_donation_memories_and_callbacks(tmp_path: Path) -> None:
    """Donated inputs are gone, memory kinds are kept, callbacks run once on each device, and raise."""
    ran = several(
        """
        seen = []
        add = jax.jit(lambda a, b: a + b, donate_argnums=0)
        add(there, there + 1).block_until_ready()
        pinned = NamedSharding(mesh, P("x"), memory_kind="pinned_host")
        kept = jax.jit(lambda a: a * 2, out_shardings=pinned)(a)
        one = SingleDeviceSharding(jax.devices()[1], memory_kind="pinned_host")
        alone = jax.jit(lambda a: a * 2, out_shardings=one)(jax.device_put(a, one))
        call = jax.pmap(lambda x: jax.pure_callback(lambda v: v * 3, jax.ShapeDtypeStruct((), np.float32), x))
        said = jax.pmap(lambda x: (jax.debug.callback(lambda v: seen.append(float(v)), x), x + 1)[1])
        said(np.arange(8, dtype=np.float32)); jax.effects_barrier()
        def refuse(v): raise ValueError("not this one")
        try: jax.pmap(lambda x: jax.pure_callback(refuse, jax.ShapeDtypeStruct((), np.float32), x))(np.zeros(8, np.float32)).block_until_ready()
        except Exception as error: raised = str(error)
        report(
            deleted=there.is_deleted(), kinds=[kept.sharding.memory_kind, alone.sharding.memory_kind],
            right=bool(np.allclose(kept, a * 2) and np.allclose(alone, a * 2)), seen=sorted(seen),
            explained=jax_mps.explain(jax.jit(lambda v: v + 1).lower(kept).compile()),
            called=np.asarray(call(np.arange(8, dtype=np.float32))).tolist(), raised=raised,
        )
        """,
        tmp_path,
    )
    got = ran.report
    assert got["deleted"]
    assert got["right"]
    assert got["kinds"] == ["pinned_host"] * 2
    assert got["seen"] == [float(i) for i in range(8)]
    assert got["called"] == [3.0 * i for i in range(8)]
    assert "not this one" in got["raised"]
    assert "8 devices" in ran.output  # that it runs on the host is said
    assert "host (XLA CPU)" in got["explained"]


def test_memory_kinds_come_back_from_the_cache(tmp_path: Path) -> None:
    """A warm program's results are in the memory that it was compiled for."""
    source = """
        one = SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")
        report(kind=jax.jit(lambda a: a * 2, out_shardings=one)(a).sharding.memory_kind)
        """
    first = several(source, tmp_path)
    again = several(source, tmp_path, NO_TRANSLATION="1")
    assert first.report["kind"] == again.report["kind"] == "unpinned_host"


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3),
        ({"JAX_MPS_NUM_DEVICES": "2", "JAX_NUM_CPU_DEVICES": "5"}, 2),
    ],
    ids=str,
)
def test_how_many(tmp_path: Path, environment: dict[str, str], count: int) -> None:
    """JAX's own two ways to ask for cpu devices hold where MLX runs on the processor; ours goes before them."""
    ran = run("report(count=jax.device_count())", tmp_path, JAX_MPS_DEVICE="cpu", **environment)
    assert ran.report["count"] == count


def test_refused(tmp_path: Path) -> None:
    """What cannot be is said plainly."""
    wrong = run("jax.devices()", tmp_path, check=False, JAX_MPS_NUM_DEVICES="many")
    assert "JAX_MPS_NUM_DEVICES='many'" in wrong.output
    ran = several(
        """
        try: jax.jit(lambda a: a + 1)(there)
        except Exception as error: report(error=str(error))
        """,
        tmp_path,
        JAX_MPS_HOST="error",
    )
    assert "JAX_MPS_HOST=error forbids" in ran.report["error"]


def test_devices_share_one_memory(tmp_path: Path) -> None:
    """Each may count on its part of what there is."""
    ran = several("report(stats=[d.memory_stats() for d in jax.devices()])", tmp_path)
    for stats in ran.report["stats"]:
        assert stats["bytes_reservable_limit"] == stats["bytes_limit"] // 8
