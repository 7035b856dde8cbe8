"""The run directory on disk: layout, logs, checkpoints, caches, costs; one writer and one reader module per file.

It knows records and settings, and no model, no engine and no tensor. docs/reference/run-directory.md is the contract.
"""
