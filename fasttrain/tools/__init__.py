"""The commands demo, doctor, export and schema, and synthetic video for the demo and the tests."""
