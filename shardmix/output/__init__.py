"""A model folder that appears whole, or not at all.

destination            where an output may go: destroying nothing, on a disk with room
disk_need              how much disk a merge takes, asked of those who write
counted_folder         a folder that nothing is written to, to count with
staging                filled out of sight, put in place by one rename
journal                which leaves of which merge are done, for a later run to go on
score_log              what scoring has found, for a later run
file_writer            byte ranges out
shard_writer           a weight file that grows: written, hashed, claimed leaf by leaf
model_folder           config, index, model card
provenance             shardmix.json, written and read back
permissions            who may read an output: nobody who could not read every source
"""
