"""Models as stages: checkpoints, shards, the paged KV cache, attention and sampling."""
