"""One open run for a command: task, policy, engine and weight sync, and sampling and scoring with them.

Does not know training, guides or AutoNPO.
"""
