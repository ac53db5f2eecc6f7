"""This machine: files, memory, devices, threads. Knows nothing of models.

units                  "2GiB" ⇄ bytes
files                  free space, how much one call moves, which files may be opened
held_folder            a folder held by its descriptor, in which no link is followed
locks                  one process at a time in a folder
digests                files cut into leaves of 4 MiB and hashed: xxh3, blake3, sha256
page_cache             which files' pages stay in the system's cache
memory, cgroups        what the process took, what is available, what a container leaves of it
buffers                where buffers lie, so that copying to and from files is fast
sigbus                 a mapped page that cannot be loaded: a mark instead of the process's end
gpus                   which GPUs there are, judged without torch
threads, timer         threads that end with their block; how long workers spend at each stage
"""
