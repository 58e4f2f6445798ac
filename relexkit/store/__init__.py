"""The trajectory store: one self-contained Zarr v3 group per run. `docs/format.md` is its
specification.

One writer at a time, any number of readers meanwhile. A step exists once its number stands in
``steps``, which is written last; whatever a crash left beyond is ignored and overwritten.

The layer above layout and encoding, whose names other modules take from here. Inside, each module
uses those before it:

- ``durable``: files written, flushed and renamed; ``lock``: the writer's lock; ``passes``: how
  columns are cut
- ``codecs``: chunks and compression of arrays; ``fastpath``: reads and writes past Zarr's pipeline
- ``encodings``: how the steps of a part are kept, a module each, and their table; ``packing``:
  tensors into parts
- ``reference``: a base that the store does not hold
- ``format``: names of the arrays; ``opening``: is this a store, and one that we read
- ``base``, ``create``: a new store with its base weights
- ``descriptions``: what Zarr's descriptions must say; ``kept``: results derived from the steps
- ``opened``: bound to the content of its steps; ``reader``: ``TrajectoryStore``, which reads them;
  ``writer``: ``StoreWriter``, which appends some
"""

from relexkit.store.base import base_sha256
from relexkit.store.create import About, Shared, create_store
from relexkit.store.fastpath.chunk_files import Encoded
from relexkit.store.format import FORMAT_VERSION, SAFE_FILE_NAME
from relexkit.store.lock import WriterLock
from relexkit.store.opened import describe_steps
from relexkit.store.opening import NotAStoreError
from relexkit.store.packing import build_layout, owned_parts
from relexkit.store.passes import ProgressCallback, blocks, column_windows, stretches
from relexkit.store.reader import TrajectoryStore
from relexkit.store.reference import Reference
from relexkit.store.writer import StoreWriter

__all__ = [
    "FORMAT_VERSION",
    "SAFE_FILE_NAME",
    "About",
    "Encoded",
    "NotAStoreError",
    "ProgressCallback",
    "Reference",
    "Shared",
    "StoreWriter",
    "TrajectoryStore",
    "WriterLock",
    "base_sha256",
    "blocks",
    "build_layout",
    "column_windows",
    "create_store",
    "describe_steps",
    "owned_parts",
    "stretches",
]
