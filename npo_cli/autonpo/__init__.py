"""AutoNPO: when to intervene in a run, how far to roll back, and doing it.

The trigger, the controller and the choice of a rollback are pure; driver, probe and actions act on a run.
It does not know the command line, nor how the loop trains a step.
"""
