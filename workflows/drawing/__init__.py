"""Using a model: sampling, interpolating, editing, augmenting, and the sheets that show it."""
