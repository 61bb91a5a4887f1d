"""The version of the package, kept apart so that nothing imports the package for its number."""

__version__ = "0.1.0.dev0"
