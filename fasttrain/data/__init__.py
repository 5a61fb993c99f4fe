"""Read unlabelled video and deliver batches of frame pairs on the device."""
