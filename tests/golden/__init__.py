"""Digests of outputs, recorded once: no byte of a merge's output may change unnoticed.

    sources       models whose every byte follows from names
    arrangements  the table of merges
    runs          an arrangement, by the command line, to digests
    outputs.json  the digests on record
    test_golden   every arrangement, in every way to run it, gives what is on record

`python -m tests.golden` records anew, and says what has changed. An output that changes on purpose
is recorded in the commit that changes it, which says why.
"""
