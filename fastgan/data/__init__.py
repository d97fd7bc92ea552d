"""From images to batches: find, decode, cache, feed; and the drawn faces."""
