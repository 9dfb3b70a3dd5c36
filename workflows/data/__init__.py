"""Pictures in: reading, splitting, shards, batches, and the conditions beside them."""
