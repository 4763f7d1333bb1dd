"""Batched decoding with a key-value cache, adapters by name over one copy of the weights: a local Predictor."""
