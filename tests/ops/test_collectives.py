"""Collectives of one process: the identity, or zeros for one that nobody sends to; anything that names another process is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_mps.errors import Unsupported

from .harness import Case, check, check_exported, run_on_mlx
from .test_elementwise import text

X = np.arange(6, dtype=np.float32).reshape(2, 3)
SUM = "({^bb0(%a: tensor<f32>, %b: tensor<f32>):\n %s = stablehlo.add %a, %b : tensor<f32>\n stablehlo.return %s : tensor<f32>\n})"
T = "tensor<2x3xf32>"


def op(name, attributes, region=""):
    return Case(name, text(f'%r = "stablehlo.{name}"(%x) {region} {{{attributes}}} : ({T}) -> {T}', "2x3xf32", result="2x3xf32"), (X,))


def groups(value, shape="1x1"):
    return f"replica_groups = dense<{value}> : tensor<{shape}xi64>"


def pairs(value, shape="1x2"):
    return f"source_target_pairs = dense<{value}> : tensor<{shape}xi64>"


def named(name, case):
    return Case(name, case.f, case.args)


IDENTITIES = [
    op("all_reduce", groups(0), SUM),
    named("all_reduce_of_all", op("all_reduce", groups("", "0x0"), SUM)),
    op("all_gather", f"all_gather_dim = 1 : i64, {groups(0)}"),
    op("all_to_all", f"split_dimension = 0 : i64, concat_dimension = 1 : i64, split_count = 1 : i64, {groups(0)}"),
    op("reduce_scatter", f"scatter_dimension = 0 : i64, {groups(0)}", SUM),
    op("collective_permute", pairs("[[0, 0]]")),
    op("collective_broadcast", groups(0)),
]
ZEROS = [
    named("permute_to_nobody", op("collective_permute", pairs("", "0x2"))),
    named("broadcast_to_nobody", op("collective_broadcast", groups("", "0x0"))),
]
REFUSED = [
    op("all_reduce", groups("[[0, 1]]", "1x2"), SUM),
    op("reduce_scatter", f"scatter_dimension = 0 : i64, {groups('[[0], [1]]', '2x1')}", SUM),
    op("collective_permute", pairs("[[0, 1]]")),
    op("collective_broadcast", groups("[[1, 0]]", "1x2")),
]


@pytest.mark.parametrize("case", IDENTITIES, ids=str)
def test_identity(case):
    np.testing.assert_array_equal(run_on_mlx(case)[0], X)
    check_exported(case)


@pytest.mark.parametrize("case", ZEROS, ids=str)
def test_zeros(case):
    np.testing.assert_array_equal(run_on_mlx(case)[0], np.zeros_like(X))
    check_exported(case)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refuses_other_processes(case):
    with pytest.raises(Unsupported, match="on one device"):
        run_on_mlx(case)


def shard_mapped(f):
    split = P("i")
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("i",))
    return jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)


L = jax.lax
MAPPED = {
    "psum": shard_mapped(lambda x: L.psum((x, x.astype(jnp.int32)), "i")),
    "pmean_pmax": shard_mapped(lambda x: (L.pmean(x, "i"), L.pmax(x, "i"))),
    "all_gather": shard_mapped(lambda x: (L.all_gather(x, "i"), L.all_gather(x, "i", tiled=True, axis=1))),
    "psum_scatter": shard_mapped(lambda x: L.psum_scatter(x, "i", tiled=True)),
    "all_to_all": shard_mapped(lambda x: L.all_to_all(x, "i", 0, 1, tiled=True)),
    "ppermute": shard_mapped(lambda x: L.ppermute(x, "i", [(0, 0)])),
    "axis_index": shard_mapped(lambda x: x + L.axis_index("i")),
}


@pytest.mark.parametrize("name", MAPPED)
def test_shard_map_of_one_device(name):
    check(Case(name, MAPPED[name], (X,)))
