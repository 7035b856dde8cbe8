"""What a person sees of a run: tables, plots, the HTML page, and the records that `npo show` prints.

It reads run directories through storage and knows no model, no engine and no terminal.
"""
