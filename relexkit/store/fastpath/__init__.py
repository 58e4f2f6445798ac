"""Local shards read and written past Zarr's pipeline: the only place that touches its inner
interface.
"""
