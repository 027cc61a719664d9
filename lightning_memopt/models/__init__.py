"""Read a model: where its blocks are and which weights are tied."""
