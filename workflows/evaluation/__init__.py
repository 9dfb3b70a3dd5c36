"""Judging models on held-out pictures: features, figures with intervals, protocols, judges of conditions."""
