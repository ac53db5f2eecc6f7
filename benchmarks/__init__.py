"""What shardmix costs, beside other tools and beside the disk. See README.md."""
