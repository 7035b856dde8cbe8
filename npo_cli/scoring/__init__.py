"""Q, V and S = (Q - Q_self)/V^alpha of guide candidates and rollback distances, with intervals, and the choice.


Pure statistics on counts and importance ratios. It knows no model, no file and no guide source.
"""
