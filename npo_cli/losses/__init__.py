"""Policy losses: advantages, importance ratios, inference/trainer mismatch, surrogates, loss terms, their statistics.

Pure functions of tensors and settings. They know no model, no prompt, no file and no guide source.
"""
