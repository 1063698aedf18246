"""Turn raw radar files into one file of training windows, or merge such files."""
