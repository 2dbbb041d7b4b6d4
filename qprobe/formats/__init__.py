"""Storage formats of one weight, behind one small protocol (`qprobe.formats.protocol`)."""
