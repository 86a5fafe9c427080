"""From token ids to text and back, written once for all engines."""
