"""The profile of a merge: its memory, page cache and speed over time.

sampler                samples memory, page cache and VRAM, by a thread
recorder               records a merge, and writes its profile at the end
profile                the profile; its field names are the JSON's
plot                   a profile as a picture, by matplotlib, in a process of its own
"""
