"""The benchmarks that prove what a projection bought."""
