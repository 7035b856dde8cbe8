"""Sampling: engines behind one interface, and the check that an engine holds the trainer's weights.

`base.Engine` is the interface, `npo_cli.registry.ENGINES` lists the engines, `openai_client` asks external models.
It does not know the policy class, runs, or losses: a model comes in as a `ModelHandle`.
"""
