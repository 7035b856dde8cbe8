"""The GRPO loop and what it needs: updates, checkpoints, resume and rollback, evaluation, trackers.

Does not know how guides are made (guides/) or when AutoNPO intervenes (autonpo/).
"""
