"""Huge models on a small machine.

- `rehearsal`: a merge of 3 x 70B or 3 x 671B, whole, killed, and gone on with
- `holes`: sparse files, and the sweeper that keeps an output sparse while it is written
- `expected_merge`: numpy's sum of the sources, held against an output
- `planning`: `shardmix plan` for 3 x 70B and for 10 x 90,000 tensors
"""
