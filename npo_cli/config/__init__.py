"""Settings: their definition, defaults and validation, and the recipes that hold them.

It knows no algorithm and imports no heavy library; other packages receive its frozen objects.
"""
