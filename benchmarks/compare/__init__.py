"""shardmix beside every other tool, beside the disk, and beside itself without some of its work."""
