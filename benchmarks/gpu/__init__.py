"""`make gpu-check`: what a machine with a GPU is asked, in order of worth and within minutes.

`steps.py` is the table of what is done, `run.py` does it, `journal.py` keeps what was measured, and
`summary.py` makes a page of that. These four need the standard library only; what a step runs is
a module of its own.
"""
