"""Batches of rollouts: which prompts, how guide rollouts are mixed in, replay buffer, pool of failed prompts.

It does not know how rollouts become an update, nor where guide rollouts come from.
"""
