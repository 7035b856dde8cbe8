"""What is missing before anything is trained: on the machine (`npo doctor`), and in a project (`npo check`).

Does not train and writes nothing.
"""
