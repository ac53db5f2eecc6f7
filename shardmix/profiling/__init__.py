"""The profile of a merge: its memory, page cache and speed over time.

sampler                samples memory, page cache and VRAM, by a thread
recording              the recording of a merge; of nothing, without a profile
recorder               records a merge, and writes its profile at the end
profile                the profile; its field names are the JSON's
profile_file           where a profile may be, and what it may replace
plot                   a profile as a picture, by matplotlib, in a process of its own

The hot loop knows only a `Clock`, and calls `lap(stage, nbytes)` at the end of a stage. So a
worker's time is divided without a rest, and the twin that counts nothing costs a call. Each thread
has its own laps, so there is no lock. matplotlib is loaded by another process, after the merge,
since a budget is one for the process that merges.
"""
