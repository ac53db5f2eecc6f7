"""Peak memory as the kernel measures it, beside what was promised, and what others keep of theirs.

- `budgets`: budgets, numbers of models, shapes, and a control group of 512 MiB
- `promise`: 64 combinations of options and sources
- `other_files`: another program's file in the page cache, after a merge larger than the cache
"""
