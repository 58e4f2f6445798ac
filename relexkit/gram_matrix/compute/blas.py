"""How relexkit uses the linear algebra library underneath NumPy."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

from threadpoolctl import ThreadpoolController


def single_threaded_blas() -> AbstractContextManager:
    """One BLAS thread while the block runs.

    All products here are small (``[T, 8192]`` times its transpose, ``T x T`` eigenvectors) and
    many; parallel work runs over windows and tensors instead. With BLAS threads on top, waiting at
    their barriers took up to 80 times the work itself on a busy machine.
    """
    return _libraries().limit(limits=1, user_api="blas")


@functools.cache
def _libraries() -> ThreadpoolController:
    """The libraries that are loaded, NumPy's among them: finding them takes longer than most
    products.
    """
    return ThreadpoolController()
