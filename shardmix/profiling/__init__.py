"""What a merge took, over time.

sampler                samples memory, page cache and VRAM, by a thread
recorder               what is sampled of a merge, and when its profile is written
profile                the profile; its field names are the JSON's
plot                   a profile as a picture, by matplotlib, in a process of its own
"""
