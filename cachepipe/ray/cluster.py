"""Ray itself: the one module that imports it for the others."""

from __future__ import annotations

try:
    import pyarrow as pa
    import ray
    import ray.data
except ImportError as error:
    raise ImportError("cachepipe.ray needs Ray with Ray Data: pip install 'cachepipe[ray]'") from error

from cachepipe.ray.settings import RaySettings, check_nodes

__all__ = ["check_cluster", "pa", "ray"]


def check_cluster(settings: RaySettings) -> None:
    """Refuse settings that do not fit the cluster.

    Raises:
        StoreError: when the cache is a folder, and the cluster has several nodes.
    """
    if not ray.is_initialized():
        ray.init()
    check_nodes(settings.cache, sum(bool(node["Alive"]) for node in ray.nodes()))
