"""Turn a dense model into one that also runs on packed patches: the engine room of ``sparsify``."""
