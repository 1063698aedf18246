"""Hold the version of the project, which files name that it writes."""

__all__ = ["SOFTWARE", "__version__"]

__version__ = "0.1.0"

SOFTWARE = f"spatspark-fast {__version__}"
"""Name and version, as they stand in files."""
