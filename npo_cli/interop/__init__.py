"""Exchange with other programs: import of other trainers' checkpoints, export of guide caches and checkpoints.

It reads and writes their formats; it does not train, and it never changes their folders.
"""
