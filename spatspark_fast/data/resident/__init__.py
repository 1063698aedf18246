"""Windows that stay in memory, packed, and are cut out and turned on the device."""
