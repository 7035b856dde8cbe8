"""Tasks: where prompts come from (`TASKS`), how responses are verified (`VERIFIERS`), and the order of the data.

`registry.load_task` makes a `Task` from the task settings. It does not know models, tokens, runs, or torch.
"""
