"""Build spatspark-fast; everything but the optional C++ engine is declared in ``pyproject.toml``."""

from setuptools import setup

setup()
