"""What is kept on disks and in buckets: whole, or not there."""
