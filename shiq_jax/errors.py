"""The one exception that the command line turns into a sentence."""


class Refusal(ValueError):
    """Input that cannot be used, told in one sentence: what was found, where, what is expected and how to mend it.

    The commands print the sentence and exit with code 2; library callers catch it as the `ValueError` it is.
    """
