"""What a scan takes, told before anything is loaded."""
