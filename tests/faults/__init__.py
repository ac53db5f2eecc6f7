"""Merges that come to harm: processes killed, calls that fail, disks that are full.

- `faulty_cli`: the command line that is harmed; the library knows nothing of faults
- `merges`: starts such command lines, and judges what is at the output path afterwards
- `campaign`: harms merges by the hundred; the long form of the tests here
"""
