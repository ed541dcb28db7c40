"""Quantised bundles and what they cost in accuracy. Nothing lives here yet; docs/ARCHITECTURE.md says what will."""
