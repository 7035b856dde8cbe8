"""The processes of one job: the launcher's environment, ranks, collectives with a deadline, and partitioning of rows.

Does not know models, recipes or run directories.
"""
