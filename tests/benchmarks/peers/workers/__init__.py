"""One module per peer, run in a process of its own, under a Python that may know nothing of qprobe."""
