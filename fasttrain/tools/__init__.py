"""The commands demo, doctor, export and schema; distillation; synthetic video for tests and benchmarks."""
