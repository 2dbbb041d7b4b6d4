"""One forward of a loaded model on a small sample: does it run, and who reads its 4-bit weights?"""
