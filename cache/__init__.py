"""The on-disk cache of translated programs: pure data, checked before use, shared by every process of one user.

This package knows nothing of JAX, MLX or plans. It stores a manifest (JSON), a few named files and large constants
under a key made of named parts, and gives them back whole or not at all. `docs/cache.md` says what it promises.
Every process imports it at its start: its values are NamedTuples, since a frozen dataclass takes 0.4 ms to make.
"""

from jax_mps.cache.entry import Alias, Damaged, Entry
from jax_mps.cache.fingerprint import Key, constant_digest, key, translator_digest
from jax_mps.cache.paths import FORMAT, Refused
from jax_mps.cache.store import Store
from jax_mps.cache.stored import Listing
from jax_mps.cache.writer import Writer

__all__ = [
    "FORMAT",
    "Alias",
    "Damaged",
    "Entry",
    "Key",
    "Listing",
    "Refused",
    "Store",
    "Writer",
    "constant_digest",
    "key",
    "translator_digest",
]
