"""Windows of radar rain: from a file, made up, changed at random."""
