"""What commands say: one way to print, rankings, tracebacks and timings for developers."""
