"""An environment in the form that verifiers had before 0.4."""


def load_environment():
    raise AssertionError("it is refused before it is called")
