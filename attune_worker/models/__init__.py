"""The feature that the FAQ calls "models": task types, registry, prices, routing and the executor."""
