"How a notebook tries a reader's answer to an exercise. Written by hand."

__all__ = ['try_it']

def try_it(
    check,          # (attempt): raises an error if the attempt is wrong
    attempt         # what the reader wrote
):
    "Print `solved`, or `not solved yet` and the name of the error that the check raised."
    try:
        check(attempt)
    except Exception as problem:
        print('not solved yet:', type(problem).__name__)
    else:
        print('solved')
