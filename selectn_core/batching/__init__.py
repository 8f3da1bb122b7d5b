"""The one place that touches private names of transformers' continuous batching.

tests/unit/batching/test_private_names.py fails, naming the culprit, when an upgrade moves one of them.
"""

from __future__ import annotations

from selectn_core.batching.continuous_batching import Callbacks, ContinuousBatching, GenerationOutput
from selectn_core.batching.kv_pages import KvPages, kv_geometry
from selectn_core.batching.probe import KvShape, kv_shapes

__all__ = ["Callbacks", "ContinuousBatching", "GenerationOutput", "KvPages", "KvShape", "kv_geometry", "kv_shapes"]
