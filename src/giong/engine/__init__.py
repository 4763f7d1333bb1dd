"""The training engine: packs, attention per row, log-probabilities in chunks, fp32 masters, one loop, checkpoints."""
