"""Commands other than training and evaluation, and synthetic video for the demo and the tests."""
