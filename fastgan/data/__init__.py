"""From images in any form to batches on the device: see loader.py, prepare.py, pool.py, feed.py."""
