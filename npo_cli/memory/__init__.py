"""Estimates of GPU memory, host memory and disk space, for `npo plan`.

It loads no weights and writes nothing: a model is counted from its config, everything else is arithmetic.
"""
