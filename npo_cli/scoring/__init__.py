"""Q, V and S = Q/V^alpha of guide candidates and rollback distances, with intervals, and the choice between them.

Pure statistics on counts and importance ratios. It knows no model, no file and no guide source.
"""
