"""Peak memory as the kernel measures it, beside what was promised."""
