"""Read a model: where its blocks are, which weights are tied, which submodules a user means."""
