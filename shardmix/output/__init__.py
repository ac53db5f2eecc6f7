"""A model folder that appears whole, or not at all.

destination            checks of an output's path: it destroys nothing, and its disk has room
disk_need              the disk space of a merge, counted by the code that writes
counted_folder         a folder that counts sizes instead of writing
staging                filled in a hidden folder, put in place by one rename
hidden_folder          that folder: found or made, this user's own, locked
swap                   the rename, and what a killed one leaves
journal                the finished leaves of a merge, for the next call to go on
score_log              the scores so far, for the next call
factor_store           the low-rank factors so far, for the next call
file_writer            byte ranges out
shard_writer           a growing weight file: written, hashed, claimed leaf by leaf
model_folder           config, index, model card
provenance             shardmix.json, written and read back
permissions            readers of an output: only those who could read every source

Files are written in this order: the data; then each file's header, without which it is not a
safetensors file; then comes fsync of the file. Auxiliary files, card, index and `shardmix.json`
follow, and fsync of them and of the folders. Then comes the rename, and fsync of both folders that
it changed; only then is success reported. (`--no-fsync` leaves the fsyncs out.) Each leaf starts
its own way to the disk (`sync_file_range`), so that the last fsync, which no signal interrupts, has
little left to wait for.
"""
