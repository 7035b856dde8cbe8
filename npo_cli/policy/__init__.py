"""The trained model: loading, log-probabilities, LoRA, vision, sharding, the optimizer and the training state on disk.

Does not know run directories, tasks or engines.
"""
