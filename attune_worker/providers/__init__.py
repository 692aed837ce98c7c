"""Wire formats of LLM providers, found by entry point."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from attune_worker.errors import ConfigurationError
from attune_worker.providers.base import Provider
from attune_worker.sections import PROVIDER_GROUP, provider_kinds


@cache
def adapter(kind: str) -> Provider:
    """Return the adapter for a wire format, loading it now; raises ``ConfigurationError`` if there is none."""
    for point in entry_points(group=PROVIDER_GROUP, name=kind):
        provider: Provider = point.load()()
        return provider
    raise ConfigurationError(f"no provider adapter {kind!r} is installed; installed: {', '.join(provider_kinds())}")
