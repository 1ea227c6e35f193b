"""Files that survive: checkpoints, buckets, local copies, locks; reading what strangers wrote."""
