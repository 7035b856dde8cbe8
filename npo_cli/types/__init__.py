"""Records that several packages share.

No behavior beyond properties of their fields; no imports of other packages, no files, no tensors.
"""
