"""The fleet's shared state in Redis."""
