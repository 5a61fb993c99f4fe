"""Frames of unlabelled video -> frame-pair batches on the device."""
