"""Methods over seeds: `npo bench` trains them, `npo compare` compares them with all costs; `npo demo` is the workflow.

It works through the commands and the files of runs, and knows no tensor.
"""
