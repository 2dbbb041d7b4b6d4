"""One file per export target, found by looking into this folder: each declares a TARGET."""
