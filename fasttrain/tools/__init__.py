"""Commands around training: export, doctor, demo, and the synthetic video that demo and tests use."""
