"""16-bit, standard and dynamic 4-bit on the same samples: the course, the results, the rows."""
