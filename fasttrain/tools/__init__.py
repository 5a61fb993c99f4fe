"""The commands demo, doctor, export and schema, distillation, and synthetic video for benchmarks and tests."""
