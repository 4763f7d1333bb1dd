"""What leaves a project: merged weights, a model card, and the proof that the exported model is the evaluated one."""
