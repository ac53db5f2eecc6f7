"""What all benchmarks stand on. Knows no benchmark."""
