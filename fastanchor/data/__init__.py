"""Images: where they come from (`sources`), how batches reach the device (`resident`), augmentation (`views`)."""
