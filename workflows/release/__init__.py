"""Versions: registering, gates, promotion with its journal, copies between registries, cleaning up."""
