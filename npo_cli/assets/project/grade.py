"""The verifier: decides whether a response is correct. Replace the rule by your own, and the data with it."""


def grade(prompt: str, response: str, answer: str) -> bool:
    """Called once per response. `answer` is the answer column of the prompt's row."""
    _, mark, result = response.partition("#")  # the micro base calculates first, then writes # and the sum
    return bool(mark) and result.strip() == answer
