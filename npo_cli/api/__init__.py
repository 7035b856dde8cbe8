"""The Python API: what `import npo_cli as npo` offers, and what the commands call.

One function per stage of the workflow; checks of arguments, callbacks, results as records. It knows no option, no
table and no algorithm, and prints nothing.
"""
