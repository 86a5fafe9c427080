"""What the figures of the pages were measured with; nothing that runs in production imports it."""
