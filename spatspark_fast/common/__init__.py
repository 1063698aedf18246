"""What every command uses: errors, units, options, files, progress and pictures of rain."""
