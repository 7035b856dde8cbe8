"""The commands: one module per command, each of which checks its arguments and prints what the layers below yield.

It knows nothing about training, sampling or files: all work happens in the packages that a command imports.
Only `main` catches errors, and only this package prints.
"""
