"""All tests run with mps as JAX's platform and a cache folder of their own."""

from __future__ import annotations

import os
import signal
import tempfile

# Before jax is imported by any test module: both platforms, so that XLA's CPU backend is the reference.
os.environ["JAX_PLATFORMS"] = "mps,cpu"
os.environ.setdefault("JAX_MPS_CACHE_DIR", tempfile.mkdtemp(prefix="jax-mps-test-"))
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # on CUDA, float32 products are TF32 by default: too coarse for the tables

# A shell's background job ignores Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
